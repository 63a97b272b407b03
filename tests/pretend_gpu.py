"""A pytest plugin that makes a CPU look like a GPU to the tests.

    PYTHONPATH=tests python -m pytest -n 0 -p pretend_gpu [tests]

There is one device, the default backend is "gpu", the CPU module has no scratch memory and no choice of
instruction sets, and the gradient of x gets random rounding errors, like sums by atomic additions in no fixed
order. A test that fails here would fail on a GPU although the kernels are right: it compares bit for bit, or
it needs the CPU module. Comparisons with brute force can fail because of the added rounding errors.
"""

import os

import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"

# The index of the gradient of x among the results of a handler.
D_X_RESULT = {
    "xla_ops.fan_in_matmul.gradients": 0,
    "xla_ops.fan_in_loss.gradients": 1,
    "xla_ops.fan_in_step.adam": 1,
    "xla_ops.fan_in_step.sgd": 1,
}


class UnusedCpuModule:
    """The CPU module as it is on a GPU: its handlers are registered, but do not run."""

    def __init__(self, module):
        self.ffi_version, self.registrations, self.isa = module.ffi_version, module.registrations, module.isa

    def peak_scratch_bytes(self):
        return 0


def pytest_sessionstart(session: pytest.Session) -> None:
    import jax
    import numpy as np

    from xla_ops import _native

    rng, call, module = np.random.default_rng(), _native._call, UnusedCpuModule(_native.cpu())

    def perturb(array):
        change = 1 + rng.integers(-1, 2, array.shape) * np.float32(2**-23)
        return (np.asarray(array, np.float32) * change.astype(np.float32)).astype(array.dtype)

    def call_and_perturb(handler, *arguments):
        results = list(call(handler, *arguments))
        if (i := D_X_RESULT.get(handler)) is not None:
            d_x = results[i]
            is_static = all(isinstance(size, int) for size in d_x.shape)
            if is_static and not jax.typeof(d_x).manual_axis_type.varying:
                shape = jax.ShapeDtypeStruct(d_x.shape, d_x.dtype)
                results[i] = jax.pure_callback(perturb, shape, d_x, vmap_method="sequential")
        return tuple(results)

    jax.default_backend, _native.cpu, _native._call = lambda: "gpu", lambda: module, call_and_perturb
