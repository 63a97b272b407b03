"""Partition specs of the variables of a head and of their moments, on a mesh that shards the labels."""

import jax
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from sparse_xmc.layers import is_by_label
from sparse_xmc.modules import path_name


def state_specs(state: nnx.State, mesh: Mesh) -> nnx.State:
    """Return the partition specs of the variables of a head."""
    by_label = PartitionSpec(mesh.axis_names)
    return jax.tree.map(
        lambda variable: by_label if is_by_label(variable) else PartitionSpec(),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def moment_specs(moments: optax.ScaleByAdamState, state: nnx.State, mesh: Mesh) -> optax.ScaleByAdamState:
    """Return the partition specs of moments, which are stored by parameter name."""
    by_label, names = PartitionSpec(mesh.axis_names), names_by_label(state)

    def specs(moments: dict[str, Array]) -> dict[str, PartitionSpec]:
        return {name: by_label if name in names else PartitionSpec() for name in moments}

    return optax.ScaleByAdamState(PartitionSpec(), specs(moments.mu), specs(moments.nu))


def names_by_label(state: nnx.State) -> set[str]:
    """Return the names of the variables of a head that have a row for each label."""
    return {path_name(path) for path, variable in nnx.to_flat_state(state) if is_by_label(variable)}
