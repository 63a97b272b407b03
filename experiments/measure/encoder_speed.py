r"""Tokens per second of a pretrained encoder, compared with PyTorch if it is installed.

    python -m experiments.measure.encoder_speed --directory=path/to/minilm --json=result.json

Both encode the same random texts on the same cores in turn, after a comparison of their features. Texts
have no padding.

    python -m experiments.measure.encoder_speed --directory=path/to/minilm --train=FILE.tsv --json=result.json

measures the time of the parts of a training step on these texts, with bags of words and a fine-tuned encoder.
"""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from sparse_xmc.cli import environment, program
from sparse_xmc.data import Dataset, LabelEncoder, TextEncoder, read_tsv
from sparse_xmc.data.batches import Batch, Batches
from sparse_xmc.data.tokens import Tokens
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.encoders.frozen_encoder import open_pretrained
from sparse_xmc.heads import FixedFanInConfig, RewireConfig
from sparse_xmc.model import ClassifierConfig, EncoderConfig, PretrainedSettings
from sparse_xmc.modules import in_evaluation
from sparse_xmc.train import Trainer, TrainingConfig

from . import clock

LENGTHS = (16, 32, 128)
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # for features scaled to a mean square of 1


def measure(
    directory: str | os.PathLike, batch_size: int, lengths: Sequence[int], dtype: str, repeats: int
) -> dict[str, Any]:
    """Measure the tokens per second by text length; PyTorch always computes in float32."""
    encoder = in_evaluation(
        PretrainedEncoder.from_directory(directory, pooling="mean", normalize=False, dtype=dtype)
    )
    graphdef, state = nnx.split(encoder)
    encode_jax = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    encode_pytorch = _by_pytorch(directory)
    rows = []
    for length in lengths:
        ids = np.random.default_rng(0).integers(encoder.config.vocab_size, size=(batch_size, length))
        ids = np.where(ids == encoder.config.pad_token_id, ids + 1, ids).astype(np.int32)
        tokens = Tokens(ids, np.full(batch_size, length, np.int32))
        calls: dict[str, Callable[[], Any]] = {"jax": functools.partial(encode_jax, state, tokens)}
        if encode_pytorch is not None:
            calls["pytorch"] = functools.partial(encode_pytorch, ids.astype(np.int64))
            expected = calls["pytorch"]()
            scale = np.sqrt(np.mean(np.square(expected)))
            np.testing.assert_allclose(calls["jax"]() / scale, expected / scale, atol=_TOLERANCE[dtype])
        times = clock.interleaved_times(calls, repeats)
        speed = {name: batch_size * length / float(np.median(seconds)) for name, seconds in times.items()}
        rows.append({"length": length, "tokens_per_second": speed})
    settings = {"batch_size": batch_size, "dtype": dtype, "hidden_size": encoder.features}
    return environment.describe() | settings | {"rows": rows}


def _by_pytorch(directory: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return a function for the mean of the outputs by the transformers library; None if not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_num_threads(environment.threads())
    model = transformers.AutoModel.from_pretrained(directory).eval()

    def encode(ids):
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids)).last_hidden_state.mean(1).numpy()

    return encode


def measure_step(
    directory: str | os.PathLike, path: str, batch_size: int, length: int, dtype: str, repeats: int
) -> dict[str, Any]:
    """Measure the seconds of a training step and of its parts, on the texts of a `.tsv` file.

    The network is that of `fixed_fan_in_32_4k_direct.cfg` with a fine-tuned encoder in addition to bags of
    words. "all but the encoder" is a step with given embeddings. Texts are tokenized once before training,
    which is not a part of a step; here it is timed for the texts of one batch.
    """
    names, texts = read_tsv(path)
    tokenizer = open_pretrained(directory, trainable=True, max_length=length)
    encoder = PretrainedEncoder.from_directory(directory, dtype=jnp.dtype(dtype))
    words, labels = TextEncoder.fit(texts), LabelEncoder.fit(names)
    embeddings = np.zeros((len(texts), encoder.features), np.float32)
    training = TrainingConfig(batch_size=batch_size, output_optimizer="sgd", rewire=RewireConfig(fraction=0))
    calls: dict[str, Callable[[], Any]] = {}
    for name, encoded, text in (
        ("step", tokenizer(texts), encoder),
        ("all but the encoder", embeddings, None),
    ):
        train = Dataset(words(texts), labels(names), encoded=encoded)
        config = ClassifierConfig(
            train.num_features,
            train.num_labels,
            bag_of_words=True,
            encoder=EncoderConfig(embedding=256),
            head=FixedFanInConfig(penultimate=4096, direct_inputs=20, output_bias=-1),
            text_features=encoder.features,
            pretrained=None if text is None else PretrainedSettings.of(text),
        )
        trainer = Trainer(config.make(train=train, network=text, rngs=nnx.Rngs(0)), training)
        batches = Batches(train, batch_size).shuffled(0, 0)
        batch_cache = list(itertools.islice(batches, 16))
        calls[name] = functools.partial(_step, trainer, itertools.cycle(batch_cache))
        if text is not None:
            calls["cutting a batch"] = functools.partial(next, batches)
    starts = itertools.cycle(range(0, len(texts) - batch_size, batch_size))
    calls["tokenising, before training"] = lambda: tokenizer(_slice(texts, next(starts), batch_size))
    times = clock.interleaved_times(calls, repeats)
    seconds = {name: float(np.median(each)) for name, each in times.items()}
    settings = {"batch_size": batch_size, "max_length": length, "dtype": dtype}
    return environment.describe() | settings | {"seconds": seconds}


def _step(trainer: Trainer, batches: Iterator[Batch]) -> jax.Array:
    return trainer.train_step(next(batches), 1e-3)


def _slice(texts: Sequence[str], start: int, count: int) -> Sequence[str]:
    return texts[start : start + count]


def step_table(report: dict[str, Any]) -> str:
    """Render the parts of a step as Markdown."""
    seconds = report["seconds"]
    parts = {"encoder": seconds["step"] - seconds["all but the encoder"], **seconds}
    lines = ["| part | ms | of a step |", "|---|---|---|"]
    for name, each in parts.items():
        lines.append(f"| {name} | {1e3 * each:.1f} | {each / seconds['step']:.1%} |")
    return "\n".join(lines)


def table(report: dict[str, Any]) -> str:
    """Render the report as Markdown."""
    names = list(report["rows"][0]["tokens_per_second"])
    lines = [f"| tokens of a text | {' | '.join(f'{name}, tokens/s' for name in names)} |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for row in report["rows"]:
        models = [f"{row['tokens_per_second'][name]:,.0f}" for name in names]
        lines.append(f"| {row['length']} | {' | '.join(models)} |")
    return "\n".join(lines)


def _define_flags() -> None:
    flags.DEFINE_string(
        "directory",
        None,
        "Directory of the pretrained encoder, in the format of Hugging Face.",
        required=True,
    )
    flags.DEFINE_integer("batch_size", 64, "Number of texts per batch.", lower_bound=1)
    flags.DEFINE_multi_integer(
        "length", list(LENGTHS), "Number of tokens per text; can be repeated.", lower_bound=1
    )
    flags.DEFINE_enum("dtype", "float32", list(_TOLERANCE), "Dtype in which JAX computes.")
    flags.DEFINE_integer("repeats", 15, "Maximum number of timed runs.", lower_bound=1)
    flags.DEFINE_string(
        "train",
        None,
        "File of texts, .tsv, on which to measure training steps; by default, encoding is measured.",
    )
    flags.DEFINE_integer(
        "max_length", 32, "Maximum number of tokens per text in training steps.", lower_bound=3
    )
    flags.DEFINE_string("json", None, "File to write the report to, as JSON.")


def main() -> None:
    """Print the table, and write --json."""
    values = flags.FLAGS
    options = (values.dtype, values.repeats)
    if values.train is not None:
        report = measure_step(values.directory, values.train, values.batch_size, values.max_length, *options)
        print(step_table(report))
    else:
        report = measure(values.directory, values.batch_size, values.length, *options)
        print(table(report))
    if values.json is not None:
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()  # not on import: tests import several programs, whose flags share names
    program.start(main)
