"""Print the planned memory of training a classifier of any size, without data.

    sparse-xmc plan --labels=670091 --features=768 --penultimate=32768 --fan_in=32
    sparse-xmc plan --labels=670091 --words=100000 --flagfile=text_direct

Settings are the flags of `sparse-xmc run`, whose `--plan` prints the plan for its data. If the memory is not
available, the exit status is 1, and the message names settings that fit.
"""

import numpy as np
import scipy.sparse
from absl import flags

from sparse_xmc.cli import program, reflection
from sparse_xmc.cli.run_flags import Settings, current_values, unused_flags
from sparse_xmc.data import Dataset
from sparse_xmc.planning import check_memory, placeholder_dataset

FLAGS = flags.FLAGS

flags.DEFINE_integer("labels", None, "L, the number of labels.", 1)
flags.DEFINE_integer("features", 768, "D, the number of dense features.", 1)
flags.DEFINE_integer("words", None, "V, the number of words, for bags of words instead of dense features.", 1)
flags.DEFINE_integer("words_per_point", 32, "Mean number of words of a point, with --words.", 1)
flags.DEFINE_float("labels_per_point", 5.0, "Mean number of labels of a point.", 0)


def main():
    """Print the memory plan for the sizes that the flags describe."""
    settings = Settings.of(current_values())
    if unused := unused_flags(*(flag.name for flag in FLAGS.get_key_flags_for_module(reflection))):
        print(f"sparse-xmc plan does not use {', '.join(f'--{name}' for name in unused)}")
    batch_size = settings.training.batch_size
    points = placeholder_dataset(FLAGS.labels, FLAGS.labels_per_point, FLAGS.features, batch_size)
    if FLAGS.words is not None:
        points = Dataset(_bags(batch_size), points.labels)
    config = settings.classifier(points.num_features, FLAGS.labels, bag_of_words=points.is_sparse)
    print(check_memory(config, settings.training, points))


def _bags(size: int) -> scipy.sparse.csr_array:
    """Return `size` bags of `words_per_point` words each, with consecutive word ids."""
    count = min(FLAGS.words_per_point, FLAGS.words)
    words = np.arange(size * count, dtype=np.int32) % FLAGS.words
    pointers = np.arange(0, size * count + 1, count)
    return scipy.sparse.csr_array((np.ones(size * count, np.float32), words, pointers), (size, FLAGS.words))


if __name__ == "__main__":
    flags.mark_flag_as_required("labels")
    program.start(main)
