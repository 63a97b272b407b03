"""Time and memory of selecting direct inputs, for `experiments.benchmark --op=select_direct_inputs`.

The synthetic points have as many points, labels and words as Amazon-670K with bags of words. Texts draw their
words as in `experiments.measure.direct_inputs`, and labels come from `experiments.measure.synthetic`.
"""

import itertools
import time
from typing import NamedTuple

import jax
import numpy as np
import scipy.sparse
from flax import nnx

from sparse_xmc.cli import environment
from sparse_xmc.cli.memory import PeakMemory
from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batches
from sparse_xmc.heads import FixedFanInConfig, RewireConfig
from sparse_xmc.heads.feature_selection import select_direct_inputs
from sparse_xmc.model import ClassifierConfig
from sparse_xmc.train import Trainer, TrainingConfig

from . import clock
from .direct_inputs import draw_words
from .synthetic import Synthetic, label_matrix
from .workloads import AMAZON_670K

_WORDS_PER_TEXT = 75
_BATCH_SIZE = 256
_STEPS = 8
_RATE = 1e-4


class Sizes(NamedTuple):
    """The sizes of a data set and a head."""

    points: int = AMAZON_670K.points
    labels: int = AMAZON_670K.labels
    words: int = 135_909
    labels_per_point: float = AMAZON_670K.labels_per_point
    penultimate: int = 32_768
    fan_in: int = 32
    direct_inputs: int = 28


def make_dataset(sizes: Sizes) -> Dataset:
    """Make texts of `_WORDS_PER_TEXT` distinct words, each scaled to norm 1, and their labels."""
    rng = np.random.default_rng(0)
    words = np.sort(draw_words(rng, sizes.points, _WORDS_PER_TEXT, sizes.words), axis=1)
    ends = np.arange(sizes.points + 1, dtype=np.int32) * _WORDS_PER_TEXT
    values = np.full(words.size, _WORDS_PER_TEXT**-0.5, np.float32)
    features = scipy.sparse.csr_array((values, words.ravel(), ends), shape=(sizes.points, sizes.words))

    source = Synthetic(sizes.labels, sizes.labels_per_point, num_features=1)
    batches = -(-sizes.points // 1000)
    positives = np.concatenate([source.batch(i, 1000).positives for i in range(batches)])[: sizes.points]
    return Dataset(features, label_matrix(positives, sizes.labels))


def measure(sizes: Sizes, now: clock.Clock = time.perf_counter) -> dict:
    """Measure the seconds (by the clock `now`) and bytes of the selection, and the seconds of a step."""
    train = make_dataset(sizes)
    memory, start = PeakMemory(), now()
    blocks = select_direct_inputs(train.features, train.labels, sizes.direct_inputs)
    num_selected = sum(int(np.sum(columns >= 0)) for _, columns, _ in blocks)
    seconds, peak = now() - start, memory.bytes()

    head = FixedFanInConfig(
        penultimate=sizes.penultimate, fan_in=sizes.fan_in, direct_inputs=sizes.direct_inputs
    )
    classifier = ClassifierConfig(sizes.words, sizes.labels, bag_of_words=True, head=head)
    model = classifier.make(train=train, rngs=nnx.Rngs(0))
    config = TrainingConfig(output_optimizer="sgd", batch_size=_BATCH_SIZE, rewire=RewireConfig(fraction=0))
    trainer, batches = Trainer(model, config), Batches(train, _BATCH_SIZE)
    del model
    times = []
    for batch in itertools.islice(batches.shuffled(0, 0), 1 + _STEPS):
        start = now()
        jax.block_until_ready(trainer.train_step(batch, _RATE))
        times.append(now() - start)
    step = float(np.median(times[1:]))  # without the first step, which compiles
    return {
        "op": "select_direct_inputs",
        "sizes": sizes._asdict(),
        "words_per_text": _WORDS_PER_TEXT,
        "chosen_per_label": num_selected / sizes.labels,
        "seconds": seconds,
        "peak_bytes": peak,
        "peak_measured_as": memory.method,
        "step_seconds": step,
        "part_of_an_epoch": seconds / (step * batches.steps_per_epoch),
        "environment": environment.describe(),
    }


def table(report: dict) -> str:
    """Render a report for the terminal."""
    return (
        f"select_direct_inputs: {', '.join(f'{k} {v:,}' for k, v in report['sizes'].items())}\n"
        f"{report['seconds']:.1f} s, which is {100 * report['part_of_an_epoch']:.1f}% of an epoch "
        f"of steps of {report['step_seconds']:.2f} s, and {report['peak_bytes'] / 2**20:.0f} MiB; "
        f"{report['chosen_per_label']:.1f} inputs per label"
    )
