import jax
import pytest

from xla_ops import _native


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    """Runs the test with each instruction set that this processor has."""
    if jax.default_backend() != "cpu":
        pytest.skip("the instruction set is the CPU's")
    before = _native.cpu().isa()
    try:
        _native.cpu().select_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _native.cpu().select_isa(before)
