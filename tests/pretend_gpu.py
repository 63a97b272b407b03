"""A plugin of pytest for machines without a GPU: the suite as a GPU would run it, as far as that goes.

    PYTHONPATH=tests python -m pytest -n 0 -p pretend_gpu [tests]

There is one device, it calls itself "gpu", the CPU's kernels do not run, and sums of the gradient
of x come out a bit different each time, as atomic additions in any order make them. So a test fails here that
would fail on a GPU without a kernel being wrong: one that compares bit for bit, or looks at the CPU's.
Those against brute force may be off by that bit.
"""

import os

import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"

# Which result of a handler is the gradient of x.
GRADIENT_OF_X = {
    "xla_ops.fan_in_matmul.gradients": 0,
    "xla_ops.fan_in_loss.gradients": 1,
    "xla_ops.fan_in_step.adam": 1,
    "xla_ops.fan_in_step.sgd": 1,
}


class Cpu:
    """The CPU's module where its kernels do not run."""

    def __init__(self, module):
        self.ffi_version, self.registrations, self.isa = module.ffi_version, module.registrations, module.isa

    def peak_scratch_bytes(self):
        return 0


def pytest_sessionstart(session: pytest.Session) -> None:
    import jax
    import numpy as np

    from xla_ops import _native

    rng, call, module = np.random.default_rng(), _native._call, Cpu(_native.cpu())

    def shake(array):
        change = 1 + rng.integers(-1, 2, array.shape) * np.float32(2**-23)
        return (np.asarray(array, np.float32) * change.astype(np.float32)).astype(array.dtype)

    def shaken(handler, *arguments):
        results = list(call(handler, *arguments))
        if (i := GRADIENT_OF_X.get(handler)) is not None:
            like = results[i]
            is_whole = all(isinstance(size, int) for size in like.shape)
            if is_whole and not jax.typeof(like).manual_axis_type.varying:
                shape = jax.ShapeDtypeStruct(like.shape, like.dtype)
                results[i] = jax.pure_callback(shake, shape, like, vmap_method="sequential")
        return tuple(results)

    jax.default_backend, _native.cpu, _native._call = lambda: "gpu", lambda: module, shaken
