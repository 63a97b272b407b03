r"""Tokens per second of a pretrained encoder, beside PyTorch's where it is installed.

    python -m experiments.measure.encoder_speed --directory=path/to/minilm --json=result.json

Both encode the same random texts on the same cores, in turn, after their features have been compared. Texts
fill their batch: no token is padding.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from experiments.measure import clock, environment
from sparse_xmc.data.tokens import Tokens
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.modules import in_evaluation

LENGTHS = (16, 32, 128)
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of features, whose mean square is 1


def measure(
    directory: str | os.PathLike, batch_size: int, lengths: Sequence[int], dtype: str, repeats: int
) -> dict[str, Any]:
    """The tokens per second by length; PyTorch computes in float32 always."""
    encoder = in_evaluation(
        PretrainedEncoder.from_directory(directory, pooling="mean", normalize=False, dtype=dtype)
    )
    graphdef, state = nnx.split(encoder)
    ours = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    theirs = _by_pytorch(directory)
    rows = []
    for length in lengths:
        ids = np.random.default_rng(0).integers(encoder.config.vocab_size, size=(batch_size, length))
        ids = np.where(ids == encoder.config.pad_token_id, ids + 1, ids).astype(np.int32)
        tokens = Tokens(ids, np.full(batch_size, length, np.int32))
        calls: dict[str, Callable[[], Any]] = {"jax": functools.partial(ours, state, tokens)}
        if theirs is not None:
            calls["pytorch"] = functools.partial(theirs, ids.astype(np.int64))
            expected = calls["pytorch"]()
            scale = np.sqrt(np.mean(np.square(expected)))
            np.testing.assert_allclose(calls["jax"]() / scale, expected / scale, atol=_TOLERANCE[dtype])
        times = clock.interleaved_times(calls, repeats)
        speed = {name: batch_size * length / float(np.median(seconds)) for name, seconds in times.items()}
        rows.append({"length": length, "tokens_per_second": speed})
    settings = {"batch_size": batch_size, "dtype": dtype, "hidden_size": encoder.features}
    return environment.describe() | settings | {"rows": rows}


def _by_pytorch(directory: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray] | None:
    """The mean of the outputs, by the transformers library; None where it is not installed."""
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


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    names = list(report["rows"][0]["tokens_per_second"])
    lines = [f"| tokens of a text | {' | '.join(f'{name}, tokens/s' for name in names)} |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for row in report["rows"]:
        cells = [f"{row['tokens_per_second'][name]:,.0f}" for name in names]
        lines.append(f"| {row['length']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _define_flags() -> None:
    flags.DEFINE_string("directory", None, "The encoder's, as Hugging Face saves it.", required=True)
    flags.DEFINE_integer("batch_size", 64, "Texts in a batch.", lower_bound=1)
    flags.DEFINE_multi_integer("length", list(LENGTHS), "Tokens of a text.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", list(_TOLERANCE), "Type of the computation in JAX.")
    flags.DEFINE_integer("repeats", 15, "Runs of each, fewer if they are slow.", lower_bound=1)
    flags.DEFINE_string("json", None, "File to write the report to.")


def main(argv: list[str]) -> None:
    """Prints the table, and writes --json."""
    if len(argv) > 1:
        raise app.UsageError(f"expected flags only, got {argv[1:]}")
    values = flags.FLAGS
    report = measure(values.directory, values.batch_size, values.length, values.dtype, values.repeats)
    print(table(report))
    if values.json is not None:
        Path(values.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    _define_flags()  # not on import: tests import several programs, and their flags share names
    app.run(main)
