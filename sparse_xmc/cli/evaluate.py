"""Evaluate a saved model: `sparse-xmc evaluate --workdir=RUN --test=test.tsv`.

RUN is as for `sparse-xmc predict`, and the points are in a format of `sparse-xmc run`. The program prints
P@k, nDCG@k and recall@k, and if the model has statistics of the training labels, propensity-scored metrics
and P@1 by label group; --json writes all of them to a file. Labels that the model does not know are ignored
and counted.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from sparse_xmc.cli import program, trained
from sparse_xmc.cli.datasets import load_for_model
from sparse_xmc.data.files import write_text
from sparse_xmc.evaluation import evaluate, evaluate_groups

flags.adopt_module_key_flags(trained)  # so that --help shows them
_TEST = flags.DEFINE_string(
    "test",
    None,
    "File of test points: .tsv (labels<TAB>text), or .txt in the format of the Extreme Classification "
    "Repository.",
    required=True,
)
_FEATURES = flags.DEFINE_string(
    "test_features", None, "File of dense features of the test points, .npy float32 [N, D]."
)
_FILTER = flags.DEFINE_string(
    "test_filter",
    None,
    "File of labels to exclude from the ranking of test points; one 'point label' pair per line.",
)
_JSON = flags.DEFINE_string("json", None, "File to write the metrics to, as JSON.")


def main() -> None:
    """Evaluate the model that the flags describe."""
    saved = trained.load().saved_
    points, unknown = load_for_model(saved, _TEST.value, features=_FEATURES.value, filter=_FILTER.value)
    statistics = saved.label_statistics
    weights = None if statistics is None else statistics.inv_propensities
    report: dict[str, Any] = {
        "points": len(points),
        "labels that the model does not know": unknown,
        "metrics": evaluate(saved.model, points, inv_propensities=weights),
    }
    if statistics is not None:
        report["p@1 by group"] = evaluate_groups(saved.model, points, statistics.groups)
    for name in ("points", "labels that the model does not know"):
        print(f"{name}: {report[name]:,}")
    for name, value in report["metrics"].items():
        print(f"{name:10s}{100 * value:8.2f}")
    for name, value in report.get("p@1 by group", {}).items():
        print(f"p@1 {name:6s}" + (f"{100 * value:8.2f}" if value is not None else "       -"))
    if _JSON.value is not None:
        write_text(Path(_JSON.value), json.dumps(report, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    program.start(main)
