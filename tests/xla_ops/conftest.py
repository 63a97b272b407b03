"""Settings and fixtures of the tests of the ops."""

import jax
import pytest

from xla_ops import _native

pytest.register_assert_rewrite("op_problems")


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    """Run the test with each instruction set of this processor; on a GPU, once."""
    if jax.default_backend() != "cpu":
        if request.param != "baseline":
            pytest.skip("instruction sets exist only on CPUs")
        yield "gpu"
        return
    default = _native.cpu().isa()
    try:
        _native.cpu().select_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _native.cpu().select_isa(default)
