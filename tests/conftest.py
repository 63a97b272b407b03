"""Settings for the whole suite: JAX at its strictest, on several devices, and reproducible examples."""

import gc
import importlib.metadata
import os
from collections.abc import Iterator

# XLA reads XLA_FLAGS once, before the first import of jax. JAX_PLATFORMS and other XLA flags are left to the
# user. Most of the suite's time goes into compiling programs that run once. XLA compiles them in less than
# half the time without optimisation and, up to jaxlib 0.10, with its older code generator. jaxlib 0.12 does
# not know the flag for that, and XLA aborts the process at a flag that it does not know.
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
# On a GPU: leave memory to the programs that tests start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import pytest

gc.set_threshold(100_000)  # as tracing makes many objects, of which few are garbage
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_default_matmul_precision", "highest"
)  # GPUs round float32 products to 10 bits otherwise

# Compilation makes the first example of a shape slow, hence no deadline.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """A compiled program takes some ten mappings of memory, and a process may have 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def standard_promotion():
    """For what strict promotion forbids: Optax's Adam promotes an integer, JAX's attention bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Runs a test with 32-bit and with 64-bit default types, as `JAX_ENABLE_X64` sets them."""
    with jax.enable_x64(request.param):
        yield request.param


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "bit_for_bit: compares training runs bit for bit: not on a GPU")
    config.addinivalue_line("markers", "plan_for_cpus: checks what memory XLA plans for a program on a CPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what a GPU may fail without anything being wrong."""
    reasons = {
        "bit_for_bit": "a GPU takes sums of the gradient of x in any order, and training repeats roughly",
        "plan_for_cpus": "XLA plans other temporaries for a GPU",
    }
    marked = [
        (item, reason) for name, reason in reasons.items() for item in items if item.get_closest_marker(name)
    ]
    if marked and jax.default_backend() != "cpu":
        for item, reason in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
