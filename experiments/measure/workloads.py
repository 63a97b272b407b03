"""Measured workloads: sizes of data sets and networks, their batches, and models described by flags.

A model is described by a list of arguments for `experiments.run`, so that measurements are of the same
training as a run with these arguments. Importing this module defines the flags of `experiments.run`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from flax import nnx
from jax.sharding import Mesh

from sparse_xmc.cli import flagfiles, run_flags
from sparse_xmc.cli.run_flags import Settings
from sparse_xmc.data.batches import Batch
from sparse_xmc.planning import MemoryPlan, placeholder_dataset, plan_memory
from sparse_xmc.train import Trainer

from .. import prepare
from .synthetic import Synthetic

BATCH_SIZE = 32
NUM_FEATURES = prepare.FEATURES["cascade"]

# The training modes of the networks in the step tables.
MODES = {
    "adam": [],
    "lean": [f"--flagfile={flagfiles.FLAGFILES / 'lean.cfg'}"],
}


# ---- data ----


class Scale(NamedTuple):
    """A number of labels, and further statistics of a data set with this number.

    Attributes:
      name: name of the data set, or a description.
      labels: L, the number of labels.
      labels_per_point: mean number of labels of a point.
      points: number of training points.
    """

    name: str
    labels: int
    labels_per_point: float
    points: int


def _published(name: str) -> Scale:
    statistics = prepare.DATASETS[name]
    return Scale(name, statistics.labels, statistics.labels_per_point, statistics.train)


def _assumed(name: str, labels: int) -> Scale:
    """Return a scale with assumed statistics, 5 labels per point and 5 points per label."""
    return Scale(f"{name} (assumed)", labels, 5.0, labels)


AMAZON_670K, AMAZON_3M = _published("Amazon-670K"), _published("Amazon-3M")
_PAPER2KEYWORDS = _assumed("8.6M", 8_623_847)

SCALES = (
    _assumed("10k", 10_000),
    _published("Wiki10-31K"),
    _published("LF-AmazonTitles-131K"),
    _published("Wiki-500K"),
    AMAZON_670K,
    _assumed("1.3M", 1_305_265),
    AMAZON_3M,
    _PAPER2KEYWORDS,
)


def make_batches(
    labels: int, labels_per_point: float, features: int = NUM_FEATURES, *, count: int, size: int = BATCH_SIZE
) -> list[Batch]:
    """Make batches of synthetic points that can be learnt."""
    source = Synthetic(labels, labels_per_point, features)
    return [source.batch(i, size) for i in range(count)]


# ---- models ----


def read_settings(arguments: Sequence[str]) -> Settings:
    """Return the configurations that `experiments.run` makes from arguments, without the command line."""
    return Settings.of(run_flags.values_of(arguments))


def make_trainer(
    arguments: Sequence[str], num_features: int, num_labels: int, *, mesh: Mesh | None = None
) -> Trainer:
    """Make a trainer of a new classifier of dense features, for the model with these arguments."""
    settings = read_settings(arguments)
    model = settings.classifier(num_features, num_labels).make(mesh=mesh, rngs=nnx.Rngs(0))
    return Trainer(model, settings.training, seed=0)


def stepper(trainer: Trainer, batches: Sequence[Batch], learning_rate: float) -> Callable[[], Any]:
    """Return a function without arguments that takes a step on the next batch and returns the new state."""

    def step():
        trainer.train_step(batches[trainer.step % len(batches)], learning_rate)
        return trainer.state

    return step


# ---- networks ----


class Network(NamedTuple):
    """The sizes of a fixed fan-in classifier, and of its data.

    Attributes:
      data: name of the data set.
      labels: L, the number of labels.
      fan_in: F, the number of inputs of a label.
      penultimate: I, the width of the penultimate layer.
      paper_gb: memory in GB reported in the paper, or None.
      features: D, the number of dense input features.
      labels_per_point: mean number of labels of a point.
    """

    data: str
    labels: int
    fan_in: int
    penultimate: int
    paper_gb: float | None
    features: int = NUM_FEATURES
    labels_per_point: float = 5.0

    def trainer(self, mode: str, *arguments: str) -> Trainer:
        """Make a trainer of the classifier.

        Args:
          mode: a key of `MODES`, whose arguments precede `arguments`.
          arguments: further arguments of `experiments.run`.
        """
        return make_trainer(self._system(mode, arguments), self.features, self.labels)

    def plan(self, mode: str, *arguments: str) -> MemoryPlan:
        """Plan the memory of training the classifier; arguments are as for `trainer`."""
        settings = read_settings(self._system(mode, arguments))
        points = placeholder_dataset(self.labels, self.labels_per_point, self.features, BATCH_SIZE)
        return plan_memory(settings.classifier(self.features, self.labels), settings.training, points)

    def _system(self, mode: str, arguments: Sequence[str]) -> list[str]:
        sizes = [f"--batch_size={BATCH_SIZE}", f"--fan_in={self.fan_in}", f"--penultimate={self.penultimate}"]
        return [*sizes, *MODES[mode], *arguments]

    def batches(self, count: int) -> list[Batch]:
        """Make batches for the classifier."""
        return make_batches(self.labels, self.labels_per_point, self.features, count=count)


def _network(scale: Scale, fan_in: int, penultimate: int, paper_gb: float | None, data: str = "") -> Network:
    return Network(
        data=data or scale.name,
        labels=scale.labels,
        fan_in=fan_in,
        penultimate=penultimate,
        paper_gb=paper_gb,
        labels_per_point=scale.labels_per_point,
    )


NETWORKS = (
    _network(AMAZON_670K, 32, 32_768, 1.45),
    _network(AMAZON_670K, 64, 100_000, 2.91),
    _network(AMAZON_3M, 64, 131_072, 8.67),
    _network(_PAPER2KEYWORDS, 32, 65_536, None, data="Paper2Keywords"),
)


def network_of_flags() -> Network:
    """Return the first of `NETWORKS` with the sizes given by flags.

    The flags are --labels and --features of this program, and --fan_in and --penultimate of
    `experiments.run`.
    """
    names = ("labels", "features", "fan_in", "penultimate")
    given: dict[str, Any] = {n: flags.FLAGS[n].value for n in names if flags.FLAGS[n].present}
    if given.get("penultimate") == 0:
        raise flags.IllegalFlagValueError(
            "--penultimate must be at least 1, as the measured networks have a penultimate layer"
        )
    return NETWORKS[0]._replace(data="as given", paper_gb=None, **given) if given else NETWORKS[0]
