r"""Write a synthetic data set with dense features, in the setting of the paper.

    python -m experiments.prepare_synthetic --labels=10000 --points=50000 --out=data/synthetic

See `experiments.measure.synthetic` for the definition of the points. Test points follow the training points;
equal sizes give identical files.
"""

from pathlib import Path

import numpy as np
from absl import flags

from sparse_xmc.cli import program
from sparse_xmc.data import files, write_xmc_labels

from .measure.synthetic import Synthetic, label_matrix
from .prepare_packages import check_out

_LABELS_PER_POINT = 5.0
_BATCH = 1000


def write(out: Path, labels: int, train_points: int, test_points: int) -> None:
    """Write `{train,test}.npy`, float32 features, and `{train,test}.txt`, labels, to a directory."""
    source = Synthetic(labels, _LABELS_PER_POINT)
    for name, first, points in (("train", 0, train_points), ("test", train_points, test_points)):
        batches = [
            source.batch(index, _BATCH) for index in range(first // _BATCH, (first + points) // _BATCH)
        ]
        positives = np.concatenate([batch.positives for batch in batches])
        np.save(out / f"{name}.npy", np.concatenate([batch.inputs for batch in batches]))
        write_xmc_labels(out / f"{name}.txt", label_matrix(positives, labels))


def main():
    """Check the flags, and write the data set."""
    values = flags.FLAGS
    check_out(values.out)
    with files.new_directory(values.out) as directory:
        write(directory, values.labels, values.points, values.test_points)


if __name__ == "__main__":
    flags.DEFINE_integer("labels", 10_000, "Number of labels.", lower_bound=1000)
    for flag, default, split in (("points", 50_000, "training"), ("test_points", 10_000, "test")):
        flags.DEFINE_integer(
            flag, default, f"Number of {split} points, a multiple of {_BATCH}.", lower_bound=_BATCH
        )
    flags.register_multi_flags_validator(
        ["points", "test_points"],
        lambda values: not any(value % _BATCH for value in values.values()),
        f"numbers of points must be multiples of {_BATCH}",
    )
    flags.DEFINE_string("out", None, "Directory to write the data set to; it must not exist.", required=True)
    program.start(main)
