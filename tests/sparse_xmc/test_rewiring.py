"""Tests of rewiring against the paper's rule in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparse_xmc.heads.rewire_layer import reset_moments, rewire_layer
from sparse_xmc.heads.rewiring import PAPER, RewireConfig, rewire, rewire_active
from sparse_xmc.layers import FixedFanInLinear

pytestmark = pytest.mark.usefixtures("standard_promotion")


def random_layer(labels=300, fan_in=8, in_features=50, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(labels, fan_in)).astype(np.float32)
    indices = np.stack([rng.choice(in_features, fan_in, replace=False) for _ in range(labels)]).astype(
        np.uint16
    )
    return kernel, indices, in_features


def run_rewire(kernel, indices, in_features, config, seed=0):
    """Rewire a layer; return the new kernel, the new indices and the mask of moved connections."""
    result = rewire(jax.random.key(seed), jnp.array(kernel), jnp.array(indices), in_features, config)
    return tuple(np.asarray(a) for a in result[:3])


@pytest.mark.parametrize("config", [PAPER, RewireConfig()])
@pytest.mark.parametrize("labels", [1, 300, 16384, 20000])  # blocks of 16384 rows; the last one overlaps
def test_only_weakest_connections_move(config, labels):
    kernel, indices, in_features = random_layer(labels)
    k = round(0.1 * kernel.size)
    expected = np.abs(kernel) < (np.sort(np.abs(kernel).ravel())[k - 1] if k else 0)
    assert expected.sum() == max(0, k - 1)

    new_kernel, new_indices, moved = run_rewire(kernel, indices, in_features, config)

    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(new_indices[~moved], indices[~moved])
    assert new_indices.max() < in_features
    if moved.sum() > 20:
        assert np.mean(new_indices[moved] != indices[moved]) > 0.8
    np.testing.assert_array_equal(new_kernel, np.where(moved, 0, kernel) if config.zero_weights else kernel)


@pytest.mark.usefixtures("x64")
def test_new_inputs_repeat_only_without_distinct():
    kernel, indices, in_features = random_layer(labels=2000, fan_in=8, in_features=10)

    def rows_with_repeats(config):
        _, new, _ = run_rewire(kernel, indices, in_features, config)
        return sum(len(set(row)) < len(row) for row in new.tolist())

    assert rows_with_repeats(RewireConfig(fraction=0.5, distinct=False)) > 100
    assert rows_with_repeats(RewireConfig(fraction=0.5)) == 0


@pytest.mark.parametrize("labels", [300, 20000])
def test_moments_of_moved_connections_are_zeroed(labels):
    kernel, indices, in_features = random_layer(labels)
    moments = (jnp.asarray(kernel + 10), jnp.ones(kernel.shape, jnp.bfloat16))
    before = [np.array(m) for m in moments]
    _, _, moved, after = rewire(
        jax.random.key(0), jnp.array(kernel), jnp.array(indices), in_features, moments=moments
    )
    for a, b in zip(after, before, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, np.where(moved, 0, b))


@pytest.mark.plan_for_cpus
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rewire_in_place_allocates_only_the_mask(dtype):
    @functools.partial(jax.jit, donate_argnums=(1, 2, 3, 4))
    def in_place(key, kernel, indices, mu, nu):
        kernel, indices, _, moments = rewire(key, kernel, indices, 32_768, moments=(mu, nu))
        return kernel, indices, moments

    size = 10_000_000 * 32
    dtypes = (dtype, jnp.uint16, jnp.float32, jnp.float32)
    arguments = [jax.ShapeDtypeStruct((10_000_000, 32), dtype) for dtype in dtypes]
    memory = in_place.lower(jax.random.key(0), *arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= (10 + jnp.dtype(dtype).itemsize) * size
    assert memory.temp_size_in_bytes < 1.05 * size, memory.temp_size_in_bytes


def test_nothing_moves_if_threshold_is_zero():
    kernel, indices, in_features = random_layer(labels=10, fan_in=10)
    kernel.ravel()[:10] = 0
    new_kernel, new_indices, moved = run_rewire(kernel, indices, in_features, PAPER)
    assert not moved.any()
    np.testing.assert_array_equal(new_indices, indices)
    np.testing.assert_array_equal(new_kernel, kernel)

    kernel.ravel()[9] = 5.0  # nine zeros left: the tenth smallest is above them
    assert run_rewire(kernel, indices, in_features, PAPER)[2].sum() == 9


@pytest.mark.parametrize("fraction", [0.0, 0.001])
def test_fraction_that_rounds_to_zero_moves_nothing(fraction):
    kernel, indices, in_features = random_layer(labels=10, fan_in=2, in_features=5)
    _, new, moved = run_rewire(kernel, indices, in_features, RewireConfig(fraction=fraction))
    assert not moved.any()
    np.testing.assert_array_equal(new, indices)


def test_new_inputs_are_uniform_and_depend_only_on_key():
    kernel, indices, in_features = random_layer(labels=4000, fan_in=8, in_features=40)
    config = RewireConfig(fraction=1.0, distinct=False)
    first, again, other = (run_rewire(kernel, indices, in_features, config, seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    counts = np.bincount(first.ravel(), minlength=in_features)
    expected = first.size / in_features
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, r"fraction must be at least 0 and at most 1, got 1\.5"),
        ({"growth": "wild"}, "growth must be one of random, active, got 'wild'"),
        (
            {"growth": "active", "distinct": False},
            "growth='active' needs distinct=True .* got distinct=False",
        ),
        (
            {"growth": "active", "zero_weights": False},
            "needs .* zero_weights=True, got .* zero_weights=False",
        ),
    ],
)
def test_invalid_config_raises(options, message):
    with pytest.raises(ValueError, match=message):
        RewireConfig(**options)


# ---- growth to active inputs ----


def rewire_active_by_loop(kernel, indices, x, positives, k):
    """Rewire label by label in NumPy; return the new indices and the mask of moved connections."""
    indices, moved = indices.copy(), np.zeros(kernel.shape, bool)
    excess = x - x.mean(axis=0, keepdims=True)
    points = {}
    for point, row in enumerate(positives):
        for label in row:
            if 0 <= label < len(kernel):
                points.setdefault(int(label), point)
    for label, point in points.items():
        best = [d for d in np.argsort(-excess[point]) if excess[point, d] > 0 and d not in indices[label]]
        weakest = np.argsort(np.abs(kernel[label]))
        for slot, new in zip(weakest[:k], best, strict=False):
            indices[label, slot], moved[label, slot] = new, True
    return indices, moved


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("fan_in", "in_features", "fraction", "k"),
    [
        (8, 50, 0.25, 2),
        (8, 12, 0.5, 4),
        (8, 8, 0.5, 4),
        (1, 9, 0.1, 1),
        (5, 70_000, 1.0, 5),
        (8, 50, 0.01, 1),
    ],
)
def test_active_growth_matches_loop(fan_in, in_features, fraction, k, dtype):
    rng = np.random.default_rng(in_features)
    kernel, indices, _ = random_layer(60, fan_in, in_features)
    kernel = np.asarray(jnp.asarray(kernel, dtype).astype(jnp.float32))
    indices = indices.astype(np.uint16 if in_features < 2**16 else np.int32)
    moments = [rng.normal(size=kernel.shape).astype(np.float32) + 10 for _ in range(2)]
    x = np.maximum(rng.normal(size=(6, in_features)), 0).astype(np.float32)
    positives = rng.integers(0, 40, (6, 5)).astype(np.int32)  # labels from 40 on have no point
    positives[:, -1] = [-1, -1, 60, np.iinfo(np.int32).max, np.iinfo(np.int32).min, positives[5, 0]]
    expected, moved = rewire_active_by_loop(kernel, indices, x, positives, k)

    results = rewire_active(
        jnp.asarray(kernel, dtype),
        jnp.array(indices),
        jnp.asarray(x),
        positives,
        RewireConfig(fraction=fraction, growth="active"),
        (jnp.array(moments[0]), jnp.asarray(moments[1], jnp.bfloat16)),
    )

    assert moved.any() == (in_features > fan_in)
    assert not moved[40:].any()
    assert results[1].dtype == indices.dtype
    np.testing.assert_array_equal(results[1], expected)
    np.testing.assert_array_equal(results[2], moved)
    np.testing.assert_array_equal(results[0].astype(jnp.float32), np.where(moved, 0, kernel))
    np.testing.assert_array_equal(results[3][0], np.where(moved, 0, moments[0]))
    assert results[3][1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(results[3][1] == 0, moved)


@pytest.mark.plan_for_cpus
@pytest.mark.parametrize(("dtype", "mask"), [(jnp.float32, 0), (jnp.bfloat16, 1)])
def test_active_growth_in_place_copies_no_layer(dtype, mask):
    @functools.partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    def in_place(kernel, indices, mu, nu, x, positives):
        config = RewireConfig(growth="active")
        kernel, indices, _, moments = rewire_active(kernel, indices, x, positives, config, (mu, nu))
        return kernel, indices, moments

    size = 10_000_000 * 32
    arguments = [
        jax.ShapeDtypeStruct((10_000_000, 32), d) for d in (dtype, jnp.uint16, jnp.float32, jnp.float32)
    ]
    batch = jax.ShapeDtypeStruct((32, 32_768), jnp.float32), jax.ShapeDtypeStruct((32, 36), jnp.int32)
    memory = in_place.lower(*arguments, *batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= (10 + jnp.dtype(dtype).itemsize) * size
    assert memory.temp_size_in_bytes < mask * size + 10e6, memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("tx", "count"),
    [
        (optax.adam(1e-2), 2),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-1e-2)), 2),
        (optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2), 2),
        (optax.sgd(1e-2, momentum=0.9), 1),
        (optax.adam(1e-2, mu_dtype=jnp.bfloat16), 2),
        (optax.partition({"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, {"output": "a", "other": "b"}), 2),
        (optax.masked(optax.adam(1e-2), {"output": {"kernel": True, "bias": False}, "other": False}), 2),
    ],
    ids=["adam", "chain", "inject_hyperparams", "momentum", "bfloat16 moments", "partition", "masked"],
)
def test_reset_moments_in_any_optimizer(tx, count):
    params = {
        "output": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(3)},
        "other": {"kernel": jnp.ones((3, 4))},
    }
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    moved = np.zeros((3, 4), bool)
    moved[0, 1] = moved[2, 3] = True

    new = reset_moments(
        tx, state, params, lambda path: path[0].key == "output" and path[1].key == "kernel", moved
    )

    zeroed = 0
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(new), strict=True
    ):
        before, after = np.asarray(before, np.float32), np.asarray(after, np.float32)
        if before.shape == (3, 4) and "output" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(after, np.where(moved, 0, before))
            assert np.all(before != 0)
            zeroed += 1
        else:
            np.testing.assert_array_equal(after, before)
    assert zeroed == count


def test_reset_moments_keeps_factored_moments():
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    params = {"kernel": jnp.ones((300, 400))}
    _, state = tx.update(params, tx.init(params), params)
    new = reset_moments(tx, state, params, lambda path: True, jnp.ones((300, 400), bool))
    factored = [a for a in jax.tree.leaves(new) if a.shape in ((300,), (400,))]
    assert len(factored) == 2
    assert all(np.all(np.asarray(a) > 0) for a in factored)


# ---- rewire_layer in a custom model ----


class TwoLayers(nnx.Module):
    """Two layers of the same shape, so that shapes do not show which moments belong to which layer."""

    def __init__(self):
        init = {"kernel_init": nnx.initializers.normal(1), "bias_init": nnx.initializers.zeros_init()}
        layer = functools.partial(FixedFanInLinear, 30, 30, 4, **init)
        self.first, self.outputs = layer(rngs=nnx.Rngs(0)), nnx.List([layer(rngs=nnx.Rngs(1))])

    def __call__(self, x):
        return self.outputs[0](nnx.relu(self.first(x)))


@nnx.jit
def train(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
    optimizer.update(model, grads)


X = np.random.default_rng(0).normal(size=(8, 30)).astype(np.float32)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("tx", "count"),
    [
        (optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda a: a.ndim > 1, params)), 2),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 2),
        (optax.MultiSteps(optax.adam(1e-2), 2), 3),
        (optax.sgd(1e-2, momentum=0.9), 1),
    ],
    ids=["adamw with a mask", "chain", "MultiSteps", "momentum"],
)
@pytest.mark.parametrize("growth", ["random", "active"])
def test_rewire_layer_with_nnx_optimizer(tx, count, growth):
    model = TwoLayers()
    layer, optimizer = model.outputs[0], nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        train(model, optimizer, X)
    before = jax.tree.map(lambda array: array, nnx.state((model, optimizer)))  # keeps the old arrays
    config, batch = RewireConfig(fraction=0.5, growth=growth), {}
    if growth == "active":
        positives = np.arange(24, dtype=np.int32).reshape(8, 3)
        batch = {"x": nnx.relu(model.first(X)), "positives": positives}

    moved = np.asarray(rewire_layer(layer, model, optimizer, jax.random.key(0), config, **batch))

    assert moved.sum() == (48 if growth == "active" else 59)
    zeroed = 0
    after = dict(jax.tree_util.tree_leaves_with_path(nnx.state((model, optimizer))))
    for path, old in jax.tree_util.tree_leaves_with_path(before):
        name, old, new = jax.tree_util.keystr(path), np.asarray(old), np.asarray(after[path])
        if "outputs" in name and "indices" in name:
            np.testing.assert_array_equal(new[~moved], old[~moved])
            assert np.mean(new[moved] != old[moved]) > 0.8
        elif "outputs" in name and "kernel" in name:
            np.testing.assert_array_equal(new, np.where(moved, 0, old))
            assert np.any(old[moved] != 0)
            zeroed += 1
        else:
            np.testing.assert_array_equal(new, old)
    assert zeroed == 1 + count
    assert all(len(set(row)) == 4 for row in np.asarray(layer.indices[...]).tolist())

    kernel = np.array(layer.kernel[...])
    for _ in range(2):
        train(model, optimizer, X)
    assert np.any(np.asarray(layer.kernel[...])[moved] != 0)
    assert np.any(np.asarray(layer.kernel[...])[~moved] != kernel[~moved])


def test_rewire_layer_under_jit():
    results = []
    for transform in (lambda function: function, nnx.jit):
        model = TwoLayers()
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        @transform
        def step(model, optimizer):
            train(model, optimizer, X)
            return rewire_layer(model.outputs[0], model, optimizer, jax.random.key(0))

        step(model, optimizer)
        results.append(nnx.state((model, optimizer)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *results)


def test_rewire_layer_that_optimizer_does_not_train():
    model = TwoLayers()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.PathContains("first"))
    before = jax.tree.map(np.array, nnx.state(optimizer))
    assert rewire_layer(model.outputs[0], model, optimizer, jax.random.key(0)).sum() == 11
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(optimizer))


def test_rewire_layer_with_invalid_arguments_raises():
    model = TwoLayers()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    call = functools.partial(rewire_layer, model.first, model, optimizer, jax.random.key(0))
    active = RewireConfig(growth="active")
    with pytest.raises(ValueError, match="the layer, a FixedFanInLinear, is not in the model, a TwoLayers"):
        rewire_layer(TwoLayers().first, model, optimizer, jax.random.key(0))
    with pytest.raises(TypeError, match=r"layer must be a FixedFanInLinear, got TwoLayers"):
        rewire_layer(model, model, optimizer, jax.random.key(0))
    other = nnx.Optimizer(model.first, optax.adam(1e-2), wrt=nnx.Param)
    before = np.array(model.first.indices[...])
    with pytest.raises(
        ValueError, match=r"^the optimizer was made for another model: .* of the model, a TwoLayers$"
    ):
        rewire_layer(model.first, model, other, jax.random.key(0))
    np.testing.assert_array_equal(model.first.indices[...], before)
    with pytest.raises(ValueError, match="growth='active' needs x and positives"):
        call(active)
    with pytest.raises(ValueError, match="sparse are for growth='active', got them for growth='random'"):
        call(x=X)
    with pytest.raises(ValueError, match=r"features must have shape \[B, 30\], got \[8, 29\]"):
        call(active, x=X[:, 1:], positives=np.zeros((8, 1), np.int32))
