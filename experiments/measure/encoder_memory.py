"""The planned memory of training steps with a BERT encoder, for `benchmark --op=encoder_memory`.

The step is a step of `Trainer` for texts, encoded as bags of words and by a fine-tuned encoder, and labels
that read words and hidden units. It is traced with shapes and compiled, so that nothing of the model is
allocated or run. XLA's plan consists of arguments (the training state and a batch) and temporaries (mostly
activations, and gradients).

The plan is for the device that compiles the program. On a CPU, temporaries differ from a GPU's: XLA fuses
other operations, and computes much of bfloat16 via float32 copies. Therefore the report also has the bytes
that autodiff keeps of the encoder from the forward to the backward pass, including weights, which depend on
the program only. The plan does not include the scratch memory of the ops on a CPU (it includes workspaces on
a GPU), the data set, and the memory of the libraries.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from sparse_xmc import planning
from sparse_xmc.cli import environment
from sparse_xmc.data.batches import BagOfWords, Batch, WordsAndText
from sparse_xmc.data.tokens import Tokens
from sparse_xmc.encoders.pretrained_files import PretrainedConfig
from sparse_xmc.heads import FixedFanInConfig, RewireConfig
from sparse_xmc.model import ClassifierConfig, EncoderConfig, PretrainedSettings
from sparse_xmc.modules import in_training, split
from sparse_xmc.train import Trainer, TrainingConfig

from .workloads import AMAZON_670K

BERT_BASE = PretrainedConfig("bert", 30_522, 768, 12, 12, 3072, max_position_embeddings=512)

# Published GiB of peak GPU memory for Amazon-670K with BERT-base (from experiments/paper).
PUBLISHED = {"ELMO, FP8": 3.55, "ELMO, BF16": 5.68, "Renee, rerun by ELMO": 11.91}

VARIANTS = tuple((dtype, remat) for dtype in ("float32", "bfloat16") for remat in (False, True))
_GIB = 2**30

# XLA's CPU compiler removes the barriers of `jax.checkpoint` before it merges equal computations, which
# undoes remat. Disabling this pass prevents it.
_OPTIONS: dict[str, dict[str, str | bool]] = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}}


class Shape(NamedTuple):
    """The sizes of a classifier and its batches.

    Attributes:
      labels: L, the number of labels.
      fan_in: F, the number of inputs of a label, of which 7 in 8 may be words.
      penultimate: I, the number of hidden units.
      vocabulary: V, the number of words.
      batch: B, the number of points in a batch.
      tokens: T, the number of tokens of a text for the encoder, and of words in its bag of words.
      embedding: E, the size of word embeddings.
      labels_per_point: mean number of labels of a point.
    """

    labels: int = AMAZON_670K.labels
    fan_in: int = 32
    penultimate: int = 4096
    vocabulary: int = 100_000
    batch: int = 128
    tokens: int = 32
    embedding: int = 256
    labels_per_point: float = AMAZON_670K.labels_per_point


# Titles, and ELMO's configuration for Amazon-670K, to which the published numbers belong.
SHAPES = (Shape(), Shape(batch=64, tokens=128))


def abstract_trainer(shape: Shape, network: PretrainedConfig, dtype: str, remat: bool) -> Trainer:
    """Make a trainer whose state consists of shapes.

    It cannot take steps, but its programs can be lowered.
    """
    config = ClassifierConfig(
        shape.vocabulary,
        shape.labels,
        bag_of_words=True,
        encoder=EncoderConfig(embedding=shape.embedding),
        head=FixedFanInConfig(
            penultimate=shape.penultimate,
            fan_in=shape.fan_in,
            direct_inputs=7 * shape.fan_in // 8,
            output_dtype="bfloat16",
        ),
        text_features=network.hidden_size,
        pretrained=PretrainedSettings(network, dtype=dtype, remat=remat),
    )
    training = TrainingConfig(
        batch_size=shape.batch,
        output_optimizer="sgd",
        moment_dtype="bfloat16",
        rewire=RewireConfig(fraction=0),
    )
    return planning.abstract_trainer(config, training)


def make_batch(shape: Shape, network: PretrainedConfig) -> Batch:
    """Make a batch of these sizes with arbitrary content."""
    rng = np.random.default_rng(0)
    entries = shape.batch * shape.tokens
    bags = BagOfWords(
        rows=np.repeat(np.arange(shape.batch, dtype=np.int32), shape.tokens),
        words=rng.integers(shape.vocabulary, size=entries).astype(np.int32),
        weights=np.full(entries, shape.tokens**-0.5, np.float32),
        num_examples=shape.batch,
    )
    ids = rng.integers(network.vocab_size, size=(shape.batch, shape.tokens)).astype(np.int32)
    tokens = Tokens(ids, np.full(shape.batch, shape.tokens, np.int32))
    max_labels = math.ceil(shape.labels_per_point + 5 * shape.labels_per_point**0.5)
    positives = np.tile(np.arange(max_labels, dtype=np.int32), (shape.batch, 1))
    return Batch(WordsAndText(bags, tokens), positives)


def bytes_kept(shape: Shape, network: PretrainedConfig, dtype: str, remat: bool) -> int:
    """Return the bytes that autodiff keeps of the encoder from the forward to the backward pass."""
    settings = PretrainedSettings(network, dtype=dtype, remat=remat)
    encoder = in_training(nnx.eval_shape(lambda: settings.make(nnx.Rngs(0))))
    graphdef, (params, rest) = split(encoder, nnx.Param)

    def pullback(params, rest, tokens):
        return jax.vjp(lambda params: nnx.merge(graphdef, params, rest, copy=True)(tokens), params)[1]

    return planning.bytes_of(
        jax.eval_shape(pullback, params, rest, make_batch(shape, network).inputs.encoded)
    )


def plan(shape: Shape, network: PretrainedConfig, dtype: str, remat: bool) -> dict[str, Any]:
    """Plan the memory of a training step, and return a row of the report, in bytes."""
    trainer = abstract_trainer(shape, network, dtype, remat)
    lowered = trainer.trace(make_batch(shape, network))["step"].lower()
    compiled = lowered.compile(compiler_options=_OPTIONS.get(jax.default_backend()))
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"XLA does not report the memory of a step on {jax.default_backend()}")
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    # All results except the loss reuse the memory of arguments.
    new_bytes = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        **shape._asdict(),
        "dtype": dtype,
        "remat": remat,
        "argument_bytes": arguments,
        "argument_parts_bytes": planning.state_parts(trainer),
        "temporary_bytes": temporaries,
        "kept_for_backward_bytes": bytes_kept(shape, network, dtype, remat),
        "new_result_bytes": new_bytes,
        "bytes": arguments + temporaries + new_bytes,
    }


def measure(
    shapes: Sequence[Shape] = SHAPES,
    network: PretrainedConfig = BERT_BASE,
    variants: Sequence[tuple[str, bool]] = VARIANTS,
) -> dict[str, Any]:
    """Plan all shapes and variants (dtype, remat), and print each result."""
    rows = []
    for shape in shapes:
        for dtype, remat in variants:
            rows.append(plan(shape, network, dtype, remat))
            print(line(rows[-1]), flush=True)
    return {
        "op": "encoder_memory",
        "network": dataclasses.asdict(network),
        "published_gib": PUBLISHED,
        "steps": rows,
        "environment": environment.describe(),
    }


def line(row: dict[str, Any]) -> str:
    """Render a row for the terminal."""
    return (
        "{labels:,} labels, {batch} x {tokens} tokens, {dtype:8} {how:13}".format(
            **row, how="with remat" if row["remat"] else "without remat"
        )
        + f"{row['bytes'] / _GIB:6.2f} GiB: arguments {row['argument_bytes'] / _GIB:.2f}, "
        f"temporaries {row['temporary_bytes'] / _GIB:.2f}; kept for backward "
        f"{row['kept_for_backward_bytes'] / _GIB:.2f}"
    )


def table(report: dict[str, Any]) -> str:
    """Render the parts of a report that `measure` does not print: sizes of the state, published results."""
    parts = report["steps"][0]["argument_parts_bytes"]
    state = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts.items())
    published = ", ".join(f"{name} {size}" for name, size in report["published_gib"].items())
    return (
        f"the state: {state}\n"
        f"published for Amazon-670K with BERT-base, GiB of peak GPU memory: {published}\n"
        f"planned for {report['environment']['device']}; peak memory of a process is more"
    )
