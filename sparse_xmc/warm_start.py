"""Training that starts from the weights of a trained model."""

from flax import nnx

from sparse_xmc.modules import path_name
from sparse_xmc.saving import SavedModel
from sparse_xmc.weights import dtype_and_shape


def start_from(saved: SavedModel, trained: SavedModel) -> None:
    """Replace the weights and connections of a classifier by those of a trained model.

    A pretrained encoder that is fine-tuned in `saved`, but was frozen in `trained`, keeps its own weights.
    Both models share arrays afterwards, so training one invalidates the other.

    Args:
      saved: the model whose weights are replaced.
      trained: the model to start from.

    Raises:
      ValueError: the models differ in sizes, words or labels.
    """
    if saved.config.num_labels != trained.config.num_labels:
        raise ValueError(
            f"the model to start from has {trained.config.num_labels} labels, "
            f"expected {saved.config.num_labels}"
        )
    for name, names in (("words", _words), ("labels", _labels)):
        if names(saved) != names(trained):
            raise ValueError(f"the model to start from has other {name}; was it trained on the same data?")
    weights, trained_weights = _weights(saved.model), _weights(trained.model)
    for name in sorted(weights.keys() | trained_weights.keys()):
        if name.startswith("encoder.text.") and name not in trained_weights:
            continue
        expected, found = (
            dtype_and_shape(variables[name][...]) if name in variables else "none"
            for variables in (weights, trained_weights)
        )
        if found != expected:
            raise ValueError(f"the model to start from is another: {name} is {found}, expected {expected}")
        weights[name].set_value(trained_weights[name][...])


def _words(saved: SavedModel) -> list[str] | None:
    return None if saved.inputs is None else saved.inputs.words.words


def _labels(saved: SavedModel) -> list[str] | None:
    return None if saved.label_encoder is None else saved.label_encoder.names


def _weights(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return all variables except random states (parameters, connections and scales) by their paths."""
    return {
        path_name(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
    }
