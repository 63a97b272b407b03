"""Flags that name a trained classifier, and a function that loads it."""

from absl import flags

from sparse_xmc import XMCClassifier
from sparse_xmc.mesh import make_mesh, parse_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the model is saved.", required=True)
_ENCODER = flags.DEFINE_string("encoder", None, "Directory of the model's frozen encoder, if it moved.")
_MESH = flags.DEFINE_string("mesh", None, "Devices to split the labels over, as for sparse-xmc run.")


def load() -> XMCClassifier:
    """Load the classifier that the flags describe."""
    mesh = None if _MESH.value is None else make_mesh(**parse_mesh(_MESH.value))
    return XMCClassifier.load(_WORKDIR.value, encoder=_ENCODER.value, mesh=mesh)
