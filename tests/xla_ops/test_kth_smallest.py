"""Tests of `kth_smallest_magnitude` against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xla_ops import kth_smallest_magnitude, kth_smallest_magnitude_reference


@given(
    st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=60),
    st.data(),
)
def test_matches_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    x = np.array(values, np.float32)
    expected = np.sort(np.abs(x))[k - 1]
    assert kth_smallest_magnitude(jnp.array(x), k) == expected
    assert kth_smallest_magnitude_reference(jnp.array(x), k) == expected


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ties(dtype):
    x = jnp.array([[3, -1, 1], [0, -2, 1]], dtype)
    assert [float(kth_smallest_magnitude(x, k)) for k in range(1, 7)] == [0, 1, 1, 1, 2, 3]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_arrays_match_sort(dtype):
    x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(1000, 999)), dtype))
    ordered = np.sort(np.abs(x.astype(np.float32)).ravel())
    for k in (1, 2, 12345, x.size - 1, x.size):
        assert kth_smallest_magnitude(x, k) == ordered[k - 1]
        assert kth_smallest_magnitude_reference(x, k) == ordered[k - 1]


@pytest.mark.usefixtures("x64")
@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sharded_arrays(dtype):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (40, 7)).astype(dtype)
    for k in (1, 77, 280):
        over_shards = jax.shard_map(
            lambda x, k=k: kth_smallest_magnitude(x, k, axes=("a", "b")),
            mesh=mesh,
            in_specs=jax.P(("a", "b")),
            out_specs=jax.P(),
        )
        assert jax.jit(over_shards)(x) == kth_smallest_magnitude(x, k)
    within_shards = jax.shard_map(
        lambda x: kth_smallest_magnitude(x, 3)[None],
        mesh=mesh,
        in_specs=jax.P(("a", "b")),
        out_specs=jax.P(("a", "b")),
    )
    expected = [kth_smallest_magnitude(shard, 3) for shard in jnp.split(x, 4)]
    np.testing.assert_array_equal(jax.jit(within_shards)(x), jnp.stack(expected))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("a")))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"kth_smallest_magnitude .*jax\.shard_map"):
        jax.block_until_ready(jax.jit(lambda x: kth_smallest_magnitude(x, 3))(sharded))
