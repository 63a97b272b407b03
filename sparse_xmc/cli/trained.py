"""Flags that name a trained classifier, and a function that loads it."""

from absl import flags

from sparse_xmc import XMCClassifier
from sparse_xmc.mesh import make_mesh, parse_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the saved model.", required=True)
_ENCODER = flags.DEFINE_string("encoder", None, "Directory of the model's frozen encoder, if it was moved.")
_MESH = flags.DEFINE_string(
    "mesh", None, "Mesh of devices for the labels, such as label:4; by default, one device."
)


def load() -> XMCClassifier:
    """Load the classifier that the flags describe."""
    mesh = None if _MESH.value is None else make_mesh(**parse_mesh(_MESH.value))
    return XMCClassifier.load(_WORKDIR.value, encoder=_ENCODER.value, mesh=mesh)
