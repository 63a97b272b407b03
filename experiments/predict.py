"""Labels for new texts: `python -m experiments.predict --workdir=RUN --input=texts.txt`.

Reads one text a line (from standard input without `--input`) and prints, for each, its best labels with their
scores, as `label<TAB>score` pairs in one line, separated by tabs. RUN is the working directory of a finished
`experiments.run` on raw text.
"""

import json
import sys
from pathlib import Path

import scipy.sparse
from absl import app, flags, logging

from experiments.datasets import LABELS, TEXT_ENCODER
from sparse_xmc.checkpoints import load_model
from sparse_xmc.data import Dataset, LabelEncoder, TextEncoder
from sparse_xmc.evaluation import predict
from sparse_xmc.models import ClassifierConfig

_WORKDIR = flags.DEFINE_string("workdir", None, "The working directory of a finished run.", required=True)
_INPUT = flags.DEFINE_string("input", None, "File of texts, one a line; standard input by default.")
_K = flags.DEFINE_integer("k", 5, "How many labels.", lower_bound=1)


def main(argv):
    """Predicts."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    workdir = Path(_WORKDIR.value)
    for name in ("model.json", "model", TEXT_ENCODER, LABELS):
        if not (workdir / name).exists():
            raise FileNotFoundError(
                f"{workdir / name}: not there; is this the directory of a finished run on text?"
            )
    config = ClassifierConfig(**json.loads((workdir / "model.json").read_text()))
    encoder, names = TextEncoder.load(workdir / TEXT_ENCODER), LabelEncoder.load(workdir / LABELS).names
    text = Path(_INPUT.value).read_text(encoding="utf-8") if _INPUT.value else sys.stdin.read()
    texts = text.removesuffix("\n").split("\n") if text else []
    points = Dataset(encoder(texts), scipy.sparse.csr_array((len(texts), len(names)), dtype=bool))
    for _, scores, labels in predict(
        load_model(workdir / "model", config), points, min(_K.value, len(names))
    ):
        for row in zip(labels, scores, strict=True):
            print("\t".join(f"{names[label]}\t{score:.4f}" for label, score in zip(*row, strict=True)))


if __name__ == "__main__":
    app.run(main)
