"""Messages that `sparse-xmc run` prints; with several processes, only the first process prints."""

import jax
import numpy as np
from absl import flags

from sparse_xmc.cli import datasets
from sparse_xmc.data import Dataset
from sparse_xmc.data.label_checks import shorten, warn_of_unusual_labels

FLAGS = flags.FLAGS


def print_once(line: str) -> None:
    """Print a line, if this is the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def print_unused_encoder_flags() -> None:
    """Print the given flags that have no effect without an encoder, or without fine-tuning it."""
    unused = []
    if not FLAGS.encoder_trainable:
        unused += [name for name in ("encoder_dtype", "encoder_remat") if FLAGS[name].present]
    if FLAGS.encoder is None:
        unused += [name for name in ("text_scale", "text_dropout") if FLAGS[name].present]
    if unused:
        reason = "a frozen encoder" if FLAGS.encoder else "a run without --encoder"
        print_once(f"{reason} does not use {', '.join(f'--{name}' for name in unused)}")


def print_sizes(splits: datasets.Splits, validation: Dataset) -> None:
    """Print the numbers of points, labels and features, and frequent labels; warn of odd labels."""
    train, test = splits.train, splits.test
    held_out = "" if FLAGS.validate_on_test else f", of which {len(validation):,} for validation"
    print_once(f"{len(train):,} training points{held_out}; {len(test):,} test points")
    unseen = ""
    if splits.unseen_labels:
        unseen = f"; {splits.unseen_labels:,} labels occur only in test points and cannot be predicted"
    print_once(f"{train.num_labels:,} labels{unseen}")
    counts = train.label_counts()
    names = None if splits.label_encoder is None else splits.label_encoder.names
    most_frequent = [label for label in np.argsort(-counts, kind="stable")[:3] if counts[label]]
    listed = ", ".join(
        f"{datasets.printable(label if names is None else shorten(names[label]))} ({counts[label]:,})"
        for label in most_frequent
    )
    mean = train.labels.nnz / max(1, len(train))
    print_once(f"{mean:.2f} labels per training point on average; most frequent: {listed or 'none'}")
    if jax.process_index() == 0:
        warn_of_unusual_labels(train.labels, names)
    kind = "features"
    if splits.inputs is not None:
        kind = "words and pairs of words" if FLAGS.ngrams > 1 else "words"
    print_once(f"{train.num_features:,} {kind}")


def print_result(result: dict) -> None:
    """Print the metrics, times and memory of a result."""
    names = [name for name in result["test"] if name in result["train"]]
    print(f"\n{'metric':10s}{'test':>8s}{'train':>8s}")
    for name in names:
        print(f"{name:10s}{100 * result['test'][name]:8.2f}{100 * result['train'][name]:8.2f}")
    print(
        f"\n{result['epochs']} epochs, {result['train_seconds']:.0f} s of training "
        f"({result['seconds_per_epoch']:.1f} s per epoch), model {result['model_bytes'] / 2**20:.0f} MiB, "
        f"peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB ({result['peak_memory_measured_as']})"
    )
