"""The model card, which describes a saved model in the README.md of its directory."""

import importlib.metadata
from collections.abc import Mapping

from sparse_xmc.inputs import InputEncoder
from sparse_xmc.model import Classifier, ClassifierConfig
from sparse_xmc.modules import count_parameters

# A README.md without this first line was written by the user, and is not replaced.
MARK = "<!-- sparse-xmc model card -->"
_PACKAGES = ("sparse-xmc", "jax", "flax")


def model_card(
    config: ClassifierConfig,
    model: Classifier,
    *,
    inputs: InputEncoder | None = None,
    is_calibrated: bool = False,
    data: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Return the model card of a saved model, in Markdown.

    Args:
      config: configuration of the classifier.
      model: the classifier.
      inputs: encoder of texts, or None if the classifier takes features.
      is_calibrated: whether the model has probabilities.
      data: description of the training data, by name; or None.
      metrics: metrics on test points, by name; or None.
    """
    if inputs is None:
        kind = "sparse" if config.bag_of_words else "dense"
        takes = f"{kind} features, float32 [N, {config.num_features}]"
    elif inputs.pretrained is None:
        takes = "texts, by their words"
    else:
        takes = "texts, by their words and a pretrained encoder"
    sizes = {
        "takes": takes,
        "labels": f"{config.num_labels:,}",
        "words": f"{config.num_features:,}" if config.bag_of_words else None,
        "parameters": f"{count_parameters(model):,}",
        "head": repr(config.head),
        "probabilities": "calibrated on held-out points" if is_calibrated else "none",
    }
    lines = [MARK, "", "# A classifier by sparse-xmc", "", *_table(sizes)]
    if data:
        lines += ["", "Trained on", "", *_table(data)]
    if metrics:
        lines += ["", "On the test points", "", *_table({n: f"{v:.4f}" for n, v in metrics.items()})]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    argument = "features" if inputs is None else "texts"
    lines += [
        "",
        "```python",
        "from sparse_xmc import XMCClassifier",
        "",
        'classifier = XMCClassifier.load("this/directory")',
        f"names, scores = classifier.predict({argument}, k=5)",
        "```",
        "",
        f"Saved with {versions}.",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Mapping[str, object]) -> list[str]:
    return ["| | |", "|---|---|"] + [
        f"| {name} | {value} |" for name, value in rows.items() if value is not None
    ]
