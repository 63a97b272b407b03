"""fan_in_top_k against a stable sort of logits that float32 holds exactly, so that ties are ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xla_ops import fan_in_matmul, fan_in_top_k, fan_in_top_k_reference


def make_problem(
    batch, in_features, labels, fan_in, *, dtype=jnp.float32, index_dtype=np.int32, with_bias=True, seed=0
):
    """(x, kernel, indices, bias) of small whole numbers; some indices are out of range."""
    rng = np.random.default_rng(seed)

    def whole(*shape):
        return rng.integers(-3, 4, shape).astype(dtype)

    indices = rng.integers(0, in_features + 2, (labels, fan_in)).astype(index_dtype)
    bias = whole(labels) if with_bias else None
    return whole(batch, in_features), whole(labels, fan_in), indices, bias


def brute_force(x, kernel, indices, bias, k):
    """(scores, labels) of shape [B, k] by loops and a stable sort."""
    logits = np.zeros((len(x), len(kernel)), np.float64)
    for label, row in enumerate(indices):
        for f, i in enumerate(row):
            if 0 <= i < x.shape[1]:
                logits[:, label] += float(kernel[label, f]) * x[:, i].astype(np.float64)
        if bias is not None:
            logits[:, label] += float(bias[label])
    labels = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(logits, labels, axis=1), labels


def assert_same(actual, expected):
    for ours, theirs, dtype in zip(actual, expected, (jnp.float32, jnp.int32), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, theirs)


top_k = jax.jit(fan_in_top_k, static_argnums=4)

# Around the kernels' tiles of 64 examples in lanes of 16, and blocks of 128 labels.
SIZES = st.fixed_dictionaries(
    {
        "batch": st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 130]),
        "in_features": st.integers(1, 50),
        "labels": st.sampled_from([1, 127, 128, 129, 300]),
        "fan_in": st.sampled_from([1, 3, 16, 17]),
    }
)
KINDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([jnp.float32, jnp.bfloat16]),
        "index_dtype": st.sampled_from([np.uint16, np.int32]),
        "with_bias": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=80)
@given(SIZES, KINDS, st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_matches_brute_force(instruction_set, sizes, kind, part):
    problem = make_problem(**sizes, **kind)
    k = round(part * sizes["labels"])
    assert_same(top_k(*problem, k), brute_force(*problem, k))


@pytest.mark.parametrize("batch", [70, 200])
def test_several_runs_of_labels(batch):
    # So many connections that a thread takes its labels through the batch in more than one go.
    problem = make_problem(batch, 30, 1500, 512)
    assert_same(top_k(*problem, 20), brute_force(*problem, 20))


@pytest.mark.usefixtures("x64")
def test_reference_matches_brute_force():
    problem = make_problem(20, 30, 150, 5)
    assert_same(fan_in_top_k_reference(*problem, 60), brute_force(*problem, 60))


def test_random_scores(instruction_set):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(70, 40)).astype(np.float32), rng.normal(size=(1000, 8)).astype(np.float32)
    indices = rng.integers(0, 40, (1000, 8)).astype(np.uint16)
    scores, labels = top_k(x, kernel, indices, None, 10)
    logits = np.asarray(fan_in_matmul(x, kernel, indices))
    np.testing.assert_allclose(scores, -np.sort(-logits, axis=1)[:, :10], rtol=1e-5)
    np.testing.assert_allclose(scores, np.take_along_axis(logits, np.asarray(labels), axis=1), rtol=1e-5)
    assert all(len(set(row)) == 10 for row in np.asarray(labels).tolist())


@pytest.mark.parametrize("k", [1, 5, 300])
def test_of_equal_scores_the_lower_label_comes_first(instruction_set, k):
    # Labels 0..299 all score 0, but 250 and 270 score 1.
    bias = np.zeros(300, np.float32)
    bias[[250, 270]] = 1
    x, kernel, indices = (
        np.ones((17, 2), np.float32),
        np.zeros((300, 1), np.float32),
        np.zeros((300, 1), np.int32),
    )
    expected = [250, 270, *(label for label in range(300) if label not in (250, 270))][:k]
    _, labels = top_k(x, kernel, indices, bias, k)
    np.testing.assert_array_equal(labels, np.tile(expected, (17, 1)))


def test_nan_and_minus_infinity_are_never_chosen(instruction_set):
    bias = np.full(200, -np.inf, np.float32)
    bias[50:100] = np.nan
    bias[[7, 60, 150]] = [-3e38, 2, np.inf]
    x, kernel, indices = (
        np.ones((2, 2), np.float32),
        np.zeros((200, 1), np.float32),
        np.zeros((200, 1), np.int32),
    )
    scores, labels = top_k(x, kernel, indices, bias, 5)
    np.testing.assert_array_equal(labels, [[150, 60, 7, -1, -1]] * 2)
    np.testing.assert_array_equal(scores, np.float32([[np.inf, 2, -3e38, -np.inf, -np.inf]] * 2))


def test_nan_of_one_point_leaves_the_others_alone():
    x, kernel, indices, bias = make_problem(20, 30, 150, 5)
    indices %= 30  # so that every label reads some feature
    expected_scores, expected_labels = brute_force(x, kernel, indices, bias, 4)
    expected_scores[11], expected_labels[11] = -np.inf, -1
    x[11] = np.nan
    assert_same(top_k(x, kernel, indices, bias, 4), (expected_scores, expected_labels))


def test_no_input_features():
    x, kernel, indices, bias = make_problem(5, 1, 6, 3)
    assert_same(top_k(x[:, :0], kernel, indices, bias, 3), brute_force(x[:, :0], kernel, indices, bias, 3))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("k", [0, 4])
def test_leading_dimensions(lead, k):
    x, kernel, indices, bias = make_problem(int(np.prod(lead)), 9, 6, 4)
    scores, labels = fan_in_top_k(x.reshape(*lead, 9), kernel, indices, bias, k)
    assert scores.shape == labels.shape == (*lead, k)
    expected = brute_force(x, kernel, indices, bias, k)
    assert_same((scores.reshape(len(x), k), labels.reshape(len(x), k)), expected)


@pytest.mark.parametrize("labels", [1, 130])
def test_more_threads_than_blocks_of_labels(labels):
    problem = make_problem(1, 30, labels, 5)
    assert_same(top_k(*problem, labels), brute_force(*problem, labels))


@pytest.mark.parametrize(
    "axes", [(0, None, None, None), (1, None, None, None), (0, 0, 0, 0), (None, 1, None, 0)], ids=str
)
def test_vmap_is_a_loop(axes):
    problems = [make_problem(7, 12, 10, 4, seed=seed) for seed in range(3)]
    arguments = [
        problems[0][i] if axis is None else np.stack([p[i] for p in problems], axis)
        for i, axis in enumerate(axes)
    ]
    scores, labels = jax.vmap(lambda *a: top_k(*a, 6), axes)(*arguments)
    for n in range(3):
        problem = [problems[0 if axis is None else n][i] for i, axis in enumerate(axes)]
        assert_same((scores[n], labels[n]), brute_force(*problem, 6))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_eval_shape(dtype):
    problem = make_problem(7, 12, 10, 4, dtype=dtype)
    scores, labels = jax.eval_shape(lambda *a: fan_in_top_k(*a, 3), *problem)
    assert (scores.shape, scores.dtype) == ((7, 3), jnp.float32)
    assert (labels.shape, labels.dtype) == ((7, 3), jnp.int32)


def test_logits_take_no_memory():
    labels = 3_000_000  # CUDA's workspace has 50 MB, for any number of labels
    shapes = [((64, 50), jnp.float32), ((labels, 1), jnp.float32), ((labels, 1), jnp.uint16)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def temporary_bytes(top_k):
        compiled = jax.jit(lambda *a: top_k(*a, None, 5)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(fan_in_top_k) < 64 * labels * 4 / 10
    if jax.default_backend() == "cpu":  # so the measurement sees them
        assert temporary_bytes(fan_in_top_k_reference) >= 64 * labels * 4


def test_other_devices():
    device = jax.devices()[-1]
    problem = make_problem(7, 12, 10, 4)
    results = top_k(*jax.device_put(problem, device), 6)
    assert all(result.devices() == {device} for result in results)
    assert_same(results, brute_force(*problem, 6))


def test_a_batch_over_devices():
    mesh = jax.make_mesh((len(jax.devices()),), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.P("i"), jax.P()
    problem = make_problem(8, 12, 10, 4)
    sharded = jax.shard_map(
        lambda *a: fan_in_top_k(*a, 6), mesh=mesh, in_specs=(split, whole, whole, whole), out_specs=split
    )
    assert_same(jax.jit(sharded)(*problem), brute_force(*problem, 6))


def test_not_differentiable():
    x, *rest = make_problem(7, 12, 10, 4)
    with pytest.raises(ValueError, match="fan_in_top_k has no derivatives"):
        jax.grad(lambda x: fan_in_top_k(x, *rest, 2)[0].sum())(x)


GOOD = dict(zip(("x", "kernel", "indices", "bias"), make_problem(2, 5, 4, 3), strict=True)) | {"k": 2}
BAD = {
    "x a scalar": ({"x": np.float32(1)}, ValueError, "x must have at least 1 dimension(s), got shape []"),
    "x in half precision": (
        {"x": np.zeros((2, 5), np.float16)},
        TypeError,
        "x must have dtype float32 or bfloat16, got float16",
    ),
    "kernel transposed": (
        {"kernel": np.zeros((3, 4), np.float32)},
        ValueError,
        "kernel must have shape [4, 3] (that of indices), got [3, 4]",
    ),
    "indices too narrow for the features": (
        {"x": np.zeros((2, 65_537), np.float32), "indices": np.zeros((4, 3), np.uint16)},
        TypeError,
        "indices must have dtype int32 where there are more than 65536 inputs, got uint16 for 65537",
    ),
    "bias empty": (
        {"bias": np.zeros(0, np.float32)},
        ValueError,
        "bias must have shape [4] (one per row of indices), got [0]",
    ),
    "k negative": ({"k": -1}, ValueError, "k must be in 0..4 (the number of labels), got -1"),
    "k above the number of labels": (
        {"k": 5},
        ValueError,
        "k must be in 0..4 (the number of labels), got 5",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error) as raised:
        fan_in_top_k(**GOOD | changes)
    assert str(raised.value) == message
