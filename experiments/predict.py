"""Labels for new texts: `python -m experiments.predict --workdir=RUN --input=texts.txt`.

Reads one text a line (from standard input without `--input`) and prints, for each, its best labels with their
scores, as `label<TAB>score` pairs in one line, separated by tabs. RUN is the working directory of a finished
`experiments.run` on raw text, or a directory that `XMCClassifier.save` wrote.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from sparse_xmc import XMCClassifier
from sparse_xmc.mesh import make_mesh, parse_mesh

from .datasets import printable

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the model is saved.", required=True)
_INPUT = flags.DEFINE_string("input", None, "File of texts, one a line; standard input by default.")
_ENCODER = flags.DEFINE_string("encoder", None, "Directory of the model's frozen encoder, if it moved.")
_MESH = flags.DEFINE_string("mesh", None, "Devices to split the labels over, as for experiments.run.")
_K = flags.DEFINE_integer("k", 5, "How many labels.", lower_bound=1)


def main(argv):
    """Predicts."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    classifier = XMCClassifier.load(
        _WORKDIR.value,
        encoder=_ENCODER.value,
        mesh=None if _MESH.value is None else make_mesh(**parse_mesh(_MESH.value)),
    )
    text = Path(_INPUT.value).read_text(encoding="utf-8") if _INPUT.value else sys.stdin.read()
    texts = text.removesuffix("\n").split("\n") if text else []
    names, scores = classifier.predict(texts, k=min(_K.value, classifier.n_labels_))
    for row in zip(names, scores, strict=True):
        print("\t".join(f"{printable(name)}\t{score:.4f}" for name, score in zip(*row, strict=True)))


if __name__ == "__main__":
    app.run(main)
