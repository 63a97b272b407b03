"""Tests of `experiments.measure.encoder_speed` with a tiny encoder."""

import importlib.util

import jax
import pytest
from flax import nnx

from experiments.measure import encoder_speed
from sparse_xmc.data import write_tsv
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.encoders.pretrained_files import PretrainedConfig


@pytest.fixture
def directory(tmp_path):
    config = PretrainedConfig("bert", 30, 8, 1, 2, 16, max_position_embeddings=16)
    PretrainedEncoder(config, rngs=nnx.Rngs(0)).save(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # Other libraries warn on import.
@pytest.mark.parametrize("with_pytorch", [False, True])
def test_measure_reports_tokens_per_second(directory, monkeypatch, with_pytorch):
    if with_pytorch and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        pytest.skip("PyTorch and transformers are not installed")
    if not with_pytorch:
        monkeypatch.setattr(encoder_speed, "_by_pytorch", lambda directory: None)
    report = encoder_speed.measure(directory, 3, (4, 9), "float32", repeats=2)
    assert [row["length"] for row in report["rows"]] == [4, 9]
    for row in report["rows"]:
        assert set(row["tokens_per_second"]) == ({"jax", "pytorch"} if with_pytorch else {"jax"})
        assert min(row["tokens_per_second"].values()) > 0
    assert encoder_speed.table(report).count("\n") == 3


def test_measure_raises_for_different_features(directory, monkeypatch):
    monkeypatch.setattr(
        encoder_speed, "_by_pytorch", lambda directory: lambda ids: ids[:, :1].repeat(8, 1).astype("float32")
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        encoder_speed.measure(directory, 3, (4,), "float32", repeats=2)


def test_measure_step_reports_parts(directory):
    tokenizers = pytest.importorskip("tokenizers")
    words = [f"w{i}" for i in range(8)]
    numbers = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    texts = [f"{words[i % 8]} {words[i % 5]}" for i in range(60)]
    write_tsv(directory / "train.tsv", [[f"label {i % 40}"] for i in range(60)], texts)
    with jax.numpy_dtype_promotion("standard"):  # Optax does not support strict promotion.
        report = encoder_speed.measure_step(directory, directory / "train.tsv", 2, 9, "float32", repeats=2)
    assert report["seconds"].keys() == {
        "step",
        "all but the encoder",
        "cutting a batch",
        "tokenising, before training",
    }
    assert min(report["seconds"].values()) > 0
    assert "| encoder |" in encoder_speed.step_table(report)
