"""The speed of a tiny encoder: that it is reported, and that features are compared first."""

import importlib.util

import pytest
from flax import nnx

from experiments.measure import encoder_speed
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.encoders.pretrained_files import PretrainedConfig


@pytest.fixture
def directory(tmp_path):
    config = PretrainedConfig("bert", 30, 8, 1, 2, 16, max_position_embeddings=16)
    PretrainedEncoder(config, rngs=nnx.Rngs(0)).save(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # those of importing other libraries
@pytest.mark.parametrize("with_pytorch", [False, True])
def test_report(directory, monkeypatch, with_pytorch):
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


def test_different_features_are_an_error(directory, monkeypatch):
    monkeypatch.setattr(
        encoder_speed, "_by_pytorch", lambda directory: lambda ids: ids[:, :1].repeat(8, 1).astype("float32")
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        encoder_speed.measure(directory, 3, (4,), "float32", repeats=2)
