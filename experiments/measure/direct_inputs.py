"""The cost of words as direct inputs: training steps and ranking, for `--op=direct_inputs` of `benchmark`.

Three layers are timed in turn on the same batch: labels that read F hidden units; labels that read F hidden
units and F words, like labels with direct inputs; and labels that read 2F hidden units, with as many weights
but without words.

Texts draw their words by Zipf's law: the word of rank r, from 1, has a probability proportional to 1 / r. A
text has about 10 distinct words, so that 256 texts have some 1,500 of 100,000 words. Frequent words rarely
distinguish labels, so labels draw distinct words with probabilities proportional to 1 / (r + 50). The
fraction of the labels' words that occur in the texts of a batch is then similar to that of real data:

    words of the labels                                                256 texts   64 texts
    drawn with these probabilities                                          0.30       0.16
    shipped data set, by `select_direct_inputs`                             0.36       0.22
    shipped data set with pairs of words, by `select_direct_inputs`         0.23       0.13
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import xla_ops
from sparse_xmc.cli import environment
from xla_ops import SparseInputs, _native

from . import clock, problems
from .problems import Shape

OPS = ("adam", "sgd", "top_k")
_WORDS_PER_TEXT = 10
_LABELS_OFFSET = 50
_K = 5
_RATE = 1e-6  # so low that the density of the gradient does not change


class Layer(NamedTuple):
    """A layer to measure; training steps update the arrays in `held`."""

    indices: Array
    sparse: SparseInputs | None
    held: list  # kernel, bias, AdamState


def cases(fan_in: int) -> tuple[str, str, str]:
    """Return the names of the layers; the first is the baseline of the comparison."""
    return f"{fan_in} units", f"{fan_in} units + {fan_in} words", f"{2 * fan_in} units"


def draw_words(
    rng: np.random.Generator, count: int, words: int, vocabulary: int, offset: float = 0.0
) -> np.ndarray:
    """Draw `words` distinct words of 0..V-1 for each of `count` texts or labels, int32.

    The probability of word w is about proportional to 1 / (w + 1 + offset).
    """
    start = 1 + offset

    def draw(number: int) -> np.ndarray:
        ranks = start * ((vocabulary + start) / start) ** rng.random(number) - start
        return np.minimum(ranks.astype(np.int32), vocabulary - 1)

    drawn = draw(count * words).reshape(count, words)
    pending = np.arange(count)
    while pending.size:  # Repeated words are drawn again.
        rows = np.sort(drawn[pending], axis=1)
        repeated = np.zeros(rows.shape, bool)
        repeated[:, 1:] = rows[:, 1:] == rows[:, :-1]
        rows[repeated] = draw(int(repeated.sum()))
        drawn[pending] = rows
        pending = pending[repeated.any(axis=1)]
    return drawn


def draw_texts(rng: np.random.Generator, batch: int, vocabulary: int) -> SparseInputs:
    """Draw texts of at least one word, 10 on average, each scaled to norm 1."""
    counts = np.minimum(1 + rng.poisson(_WORDS_PER_TEXT - 1, batch), vocabulary)
    columns = [draw_words(rng, 1, int(n), vocabulary)[0] for n in counts]
    return SparseInputs(
        rows=jnp.asarray(np.repeat(np.arange(batch, dtype=np.int32), counts)),
        columns=jnp.asarray(np.concatenate(columns)),
        values=jnp.asarray(np.repeat(counts**-0.5, counts).astype(np.float32)),
        num_columns=vocabulary,
    )


def make_layers(
    shape: Shape, vocabulary: int, rng: np.random.Generator
) -> tuple[dict[str, Layer], Array, Array]:
    """Make the layers by name, x [B, D] and positives [B, P].

    The logits are drawn as in `problems.fan_in_loss`, so that their gradient has the requested density;
    moments are nonzero, as during training.
    """
    units, direct, wide = cases(shape.fan_in)
    texts = draw_texts(rng, shape.batch, vocabulary)
    layers = {}
    for name, fan_in in ((units, shape.fan_in), (direct, shape.fan_in), (wide, 2 * shape.fan_in)):
        problem = problems.fan_in_loss(shape._replace(fan_in=fan_in), jnp.dtype(jnp.float32), rng)
        x, kernel, bias = problem.values
        indices, positives = next(iter(problem.contenders.values())).constants
        if name == direct:
            words = shape.inputs + draw_words(rng, shape.labels, fan_in, vocabulary, _LABELS_OFFSET)
            dtype = xla_ops.index_dtype(shape.inputs + vocabulary)
            indices = jnp.asarray(np.concatenate([indices, words], axis=1).astype(dtype))
            kernel = jnp.concatenate([kernel, kernel], axis=1)
        step = [1e-8 * jnp.abs(a) for a in (kernel, bias)]
        squares = [a * a for a in step]
        moments = (a for pair in zip(step, squares, strict=True) for a in pair)
        mu_kernel, nu_kernel, mu_bias, nu_bias = moments
        state = xla_ops.AdamState(jnp.int32(1000), mu_kernel, nu_kernel, mu_bias, nu_bias)
        layers[name] = Layer(indices, texts if name == direct else None, [kernel, bias, state])
    return layers, x, positives


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def _adam(kernel, bias, state, x, indices, sparse, positives):
    loss, d_x, *held = xla_ops.fan_in_adam_step(
        x, kernel, indices, bias, positives, state, _RATE, sparse=sparse
    )
    return held, loss, d_x


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _sgd(kernel, bias, x, indices, sparse, positives):
    loss, d_x, *held = xla_ops.fan_in_sgd_step(x, kernel, indices, bias, positives, _RATE, sparse=sparse)
    return held, loss, d_x


@jax.jit
def _top_k(kernel, bias, x, indices, sparse):
    return xla_ops.fan_in_top_k(x, kernel, indices, bias, _K, sparse=sparse)


def _calls(layer: Layer, x: Array, positives: Array) -> dict[str, Any]:
    """Return the ops as functions without arguments; training steps update the held layer in place."""
    indices, sparse, held = layer

    def adam():
        held[:], *results = _adam(*held, x, indices, sparse, positives)
        return results

    def sgd():
        held[:2], *results = _sgd(*held[:2], x, indices, sparse, positives)
        return results

    return {"adam": adam, "sgd": sgd, "top_k": lambda: _top_k(*held[:2], x, indices, sparse)}


def measure(shape: Shape, vocabulary: int, repeats: int, now: clock.Clock = time.perf_counter) -> dict:
    """Time all ops of all layers in turn by the clock `now`; return a report serializable as JSON."""
    layers, x, positives = make_layers(shape, vocabulary, np.random.default_rng(0))
    base, direct, _ = names = cases(shape.fan_in)
    ops = {name: _calls(layers[name], x, positives) for name in names}
    calls = {(op, name): ops[name][op] for op in OPS for name in names}
    times = clock.interleaved_times(calls, repeats, clock=now)
    medians = {op: {name: float(np.median(times[op, name])) for name in names} for op in OPS}
    return {
        "op": "direct_inputs",
        "shape": shape._asdict(),
        "vocabulary": vocabulary,
        "words": _statistics(layers[direct], shape),
        "median_seconds": medians,
        "quartiles_seconds": {
            op: {name: np.quantile(times[op, name], [0.25, 0.75]).tolist() for name in names} for op in OPS
        },
        "over_units_alone": {
            op: {n: s[n] / s[base] for n in names if n != base} for op, s in medians.items()
        },
        "instruction_set": _native.cpu().isa(),
        "environment": environment.describe(),
    }


def _statistics(layer: Layer, shape: Shape) -> dict:
    """Return the number of distinct words in the batch, and the fraction of the labels' words in it."""
    assert layer.sparse is not None
    present = np.zeros(layer.sparse.num_columns, bool)
    present[np.asarray(layer.sparse.columns)] = True
    label_words = np.asarray(layer.indices[:, shape.fan_in :]) - shape.inputs
    return {"different": int(present.sum()), "part_of_labels_words": float(present[label_words].mean())}


def table(report: dict) -> str:
    """Render a report for the terminal."""
    machine, words = report["environment"], report["words"]
    lines = [
        "direct_inputs: " + ", ".join(f"{k} {v:,}" for k, v in report["shape"].items()),
        f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}, {report['instruction_set']}",
        f"{words['different']:,} of {report['vocabulary']:,} words in the batch, "
        f"and {words['part_of_labels_words']:.2f} of the labels' words",
        "",
    ]
    names = list(next(iter(report["median_seconds"].values())))
    lines.append(f"{'ms: median (over units alone)':32}" + "".join(f"{name:>24}" for name in names))
    for op, seconds in report["median_seconds"].items():
        over = report["over_units_alone"][op]
        models = [
            f"{1e3 * s:,.1f}" + (f" ({over[name]:.2f})" if name in over else "")
            for name, s in seconds.items()
        ]
        lines.append(f"{op:32}" + "".join(f"{model:>24}" for model in models))
    return "\n".join(lines)
