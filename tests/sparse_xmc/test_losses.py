import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from sparse_xmc.losses import LOSSES, squared_hinge

PER_LOGIT = {
    "squared_hinge": lambda y, s: max(0.0, 1 - y * s) ** 2,
    "bce": lambda y, s: float(np.logaddexp(0, -y * s)),
}


def brute_force(name, logits, positives):
    """Return the mean loss of all logits, computed by a loop over points and labels."""
    total = 0.0
    for scores, row in zip(logits.astype(np.float64), positives, strict=True):
        for label, s in enumerate(scores):
            total += PER_LOGIT[name](1 if label in row else -1, s)
    return total / logits.size


@st.composite
def problems(draw):
    """Draw logits [B, L], and positives [B, P] that are distinct in each row and padded with -1."""
    batch, labels, width = draw(st.sampled_from([(1, 1, 1), (3, 12, 0), (4, 7, 7), (5, 12, 4)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positives = np.argsort(rng.random((batch, labels)), axis=1)[:, :width].astype(np.int32)
    positives[rng.random(positives.shape) < 0.4] = -1
    return rng.normal(scale=2, size=(batch, labels)).astype(np.float32), positives


@settings(max_examples=25)
@given(st.sampled_from(list(LOSSES)), problems())
def test_losses_match_brute_force(name, problem):
    logits, positives = problem
    np.testing.assert_allclose(
        LOSSES[name](logits, positives), brute_force(name, logits, positives), rtol=1e-5
    )


def test_squared_hinge_of_known_logits():
    logits = np.array([[0.5, -2.0, 0.0], [3.0, -1.0, 1.0]], np.float32)
    positives = np.array([[0, 2], [0, -1]], np.int32)
    # Point 0 has labels 0 and 2, and point 1 has label 0.
    expected = ((1 - 0.5) ** 2 + 0 + (1 - 0) ** 2 + 0 + 0 + (1 + 1) ** 2) / 6
    assert squared_hinge(logits, positives) == pytest.approx(expected)
    np.testing.assert_allclose(
        jax.grad(squared_hinge)(logits, positives),
        np.array([[-2 * 0.5, 0, -2 * 1], [0, 0, 2 * 2]]) / 6,
        rtol=1e-6,
    )


def test_binary_cross_entropy_of_known_logits():
    logits = np.array([[0.0, np.log(3)], [-np.log(3), 0.0]], np.float32)
    positives = np.array([[1], [-1]], np.int32)
    # The probabilities are 1/2, 3/4, 1/4 and 1/2. Only the second belongs to a positive.
    expected = -(np.log(1 / 2) + np.log(3 / 4) + np.log(3 / 4) + np.log(1 / 2)) / 4
    assert LOSSES["bce"](logits, positives) == pytest.approx(expected)
    np.testing.assert_allclose(
        jax.grad(LOSSES["bce"])(logits, positives),
        np.array([[1 / 2, 3 / 4 - 1], [1 / 4, 1 / 2]]) / 4,
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(name):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7)).astype(np.float32)
    positives = np.array([[1, 4, -1], [-1, -1, -1], [0, 5, 6]], np.int32)
    check_grads(
        lambda s: 10 * LOSSES[name](s, positives), (logits,), order=1, modes=["rev"], eps=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize("excess", [0.0, 0.3, 40.0])
def test_squared_hinge_gradient_is_exactly_zero_beyond_margin(excess):
    positives = np.array([[2, 0], [4, -1]], np.int32)
    logits = np.full((2, 5), -1 - excess, np.float32)
    logits[0, [0, 2]] = logits[1, 4] = 1 + excess
    logits[1, 3] = 0
    gradient = jax.grad(squared_hinge)(logits, positives)
    assert np.argwhere(gradient).tolist() == [[1, 3]]


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_binary_cross_entropy_of_extreme_logits(size):
    logits = np.array([[size, -size, size, -size]], np.float32)
    positives = np.array([[0, 1]], np.int32)
    value, gradient = jax.value_and_grad(LOSSES["bce"])(logits, positives)
    np.testing.assert_allclose(value, 2 * size / 4, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, -0.25, 0.25, 0]], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_of_positives_add_no_rounding_error(name):
    logits = np.full((2, 50), -200.0, np.float32)
    logits[:, 3] = [137.3, 2e19]
    assert LOSSES[name](logits, np.array([[3], [3]], np.int32)) == 0
