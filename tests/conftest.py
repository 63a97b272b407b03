"""Settings of the test suite: strict promotion in JAX, 8 CPU devices, reproducible Hypothesis examples."""

import gc
import importlib.metadata
import os
from collections.abc import Iterator

# XLA reads XLA_FLAGS only once, so it must be set before jax is imported. JAX_PLATFORMS and other XLA flags
# are left to the user. Most of the suite's time goes into compiling programs that run once. XLA compiles them
# in less than half the time without optimisation and, up to jaxlib 0.10, with its older code generator.
# jaxlib 0.12 does not have the flag for that, and XLA aborts the process if it is given an unknown flag.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
# On a GPU, leave memory for the processes that tests start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import pytest

gc.set_threshold(100_000)  # tracing allocates many objects, few of which are garbage
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_default_matmul_precision", "highest"
)  # otherwise GPUs round the factors of float32 products to 10 bits

# Compilation makes the first example of a shape slow, hence no deadline.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def _clear_caches():
    """Free the compiled programs of a module: each has about 10 memory mappings, of at most 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def standard_promotion():
    """Allow implicit promotion: Optax's Adam promotes an integer, and JAX's attention promotes bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Run a test with 32-bit and with 64-bit default types, as `JAX_ENABLE_X64` sets them."""
    with jax.enable_x64(request.param):
        yield request.param


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "bit_for_bit: compares training runs bit for bit; skipped on a GPU")
    config.addinivalue_line(
        "markers", "plan_for_cpus: checks the memory that XLA plans on a CPU; skipped on a GPU"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests on a GPU that can fail there although the code is correct."""
    reasons = {
        "bit_for_bit": "a GPU sums the gradient of x in no fixed order, so training is not reproducible",
        "plan_for_cpus": "XLA plans different temporaries for a GPU",
    }
    marked = [
        (item, reason) for name, reason in reasons.items() for item in items if item.get_closest_marker(name)
    ]
    if marked and jax.default_backend() != "cpu":
        for item, reason in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
