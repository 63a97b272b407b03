r"""Train `XMCClassifier` with its defaults on a data set of texts, and evaluate it on the test points.

    python -m experiments.defaults --train=data/manpages/train.tsv.gz --test=data/manpages/test.tsv.gz \
        --json=experiments/results/defaults/manpages.json

Use data sets on which the defaults were not chosen.
"""

import json
import time
from pathlib import Path

from absl import flags

from sparse_xmc import XMCClassifier
from sparse_xmc.cli import environment, program
from sparse_xmc.data import read_tsv
from sparse_xmc.evaluation import evaluate
from sparse_xmc.metrics import inverse_propensities


def measure(train: str, test: str) -> dict:
    """Train and evaluate a classifier; return a report that is serializable as JSON."""
    labels, texts = read_tsv(train)
    start = time.perf_counter()
    classifier = XMCClassifier(verbose=True).fit(texts, labels)
    seconds = time.perf_counter() - start
    saved = classifier.saved_
    # The classifier was trained on texts and label names.
    assert saved.inputs is not None
    assert saved.label_encoder is not None
    test_labels, test_texts = read_tsv(test)
    points = saved.inputs(test_texts).with_labels(saved.label_encoder(test_labels))
    weights = inverse_propensities(saved.label_encoder(labels))
    return {
        "train": train,
        "test": evaluate(saved.model, points, inv_propensities=weights),
        "points": len(texts),
        "labels": classifier.n_labels_,
        "fit_seconds": seconds,
        "epochs": len(classifier.history_),
        "model": saved.config.to_json(),
        "environment": environment.describe(),
    }


def _define_flags() -> None:
    flags.DEFINE_string("train", None, "File of training points, .tsv (labels<TAB>text).", required=True)
    flags.DEFINE_string("test", None, "File of test points, in the same format.", required=True)
    flags.DEFINE_string("json", None, "File to write the report to, as JSON.")


def main() -> None:
    """Train, print the metrics, and write --json."""
    values = flags.FLAGS
    report = measure(values.train, values.test)
    precisions = "/".join(f"{100 * report['test'][f'p@{k}']:.2f}" for k in (1, 3, 5))
    print(f"test P@1/3/5 {precisions}, fitted in {report['fit_seconds']:.0f} s, {report['epochs']} epochs")
    if values.json is not None:
        Path(values.json).parent.mkdir(parents=True, exist_ok=True)
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()  # not on import: other programs have flags of the same names
    program.start(main)
