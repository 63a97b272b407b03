"""Tests of examples/ on few points; the notebook runs with and without a tiny pretrained encoder."""

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from sparse_xmc.cli.run_flags import values_of
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.encoders.pretrained_files import PretrainedConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "text_to_labels.ipynb"
SIZES = {"fan_in": 8, "penultimate": 64, "embedding": 16, "epochs": 1, "batch_size": 32, "max_length": 12}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run_notebook(**settings):
    """Execute the cells in one namespace, and return the namespace.

    Args:
      settings: new values of variables that the first cell sets.
    """
    first, *rest = ("".join(cell["source"]) for cell in code_cells())
    namespace = {}
    exec(first, namespace)
    unknown = settings.keys() - namespace.keys()
    assert not unknown, f"the first cell does not set {unknown}"
    namespace |= settings
    for source in rest:
        exec(source, namespace)
    return namespace


def make_encoder(directory):
    """Save a random BERT with one layer, and a tokenizer for a few words; return the directory."""
    if not all(map(importlib.util.find_spec, ("tokenizers", "safetensors"))):
        pytest.skip("tokenizers and safetensors are not installed")
    import tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "of", "or", "the", "large", "small", "person", "water"]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = PretrainedConfig("bert", len(words), 8, 1, 2, 16, max_position_embeddings=16)
    PretrainedEncoder(config, rngs=nnx.Rngs(0)).save(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("encoder", [False, True])
def test_notebook(encoder, tmp_path, capsys):
    settings = {"ENCODER": str(make_encoder(tmp_path / "encoder"))} if encoder else {}
    model = tmp_path / "model"
    namespace = run_notebook(POINTS=400, TEST_POINTS=100, SETTINGS=SIZES, MODEL=str(model), **settings)
    assert namespace["loaded"].saved_.config.text_features == (8 if encoder else 0)
    assert (model / "frozen_encoder.json").exists() == encoder
    assert 0 < namespace["metrics"]["p@1"] <= 1
    np.testing.assert_array_equal(namespace["names"].shape, (3, 5))
    printed = capsys.readouterr().out
    assert printed.count("a person who plays the violin") == 2  # before saving and after loading


def test_notebook_has_no_outputs():
    for cell in code_cells():
        assert not cell["outputs"]
        assert cell["execution_count"] is None


def test_own_network(tmp_path):
    main = runpy.run_path(str(EXAMPLES / "own_network.py"))["main"]
    metrics = main(points=3000, epochs=5, path=str(tmp_path / "weights"))
    assert metrics["p@1"] > 0.5


def test_paper_table_to_your_data(tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLES / "paper_table_to_your_data.py"))
    row = example["ROWS"].popitem()[1]  # only its flags are checked, to save time
    assert values_of([f"--flagfile={name}" for name in row])["direct_inputs"] == 28
    (paper,) = example["main"]([f"--workdir={tmp_path}", "--epochs=3", "--penultimate=64"]).values()
    assert paper["flags"]["validate_on_test"]
    assert paper["epochs"] == 3
    printed = capsys.readouterr().out
    assert "the paper's row         P@1/3/5" in printed
    assert "w3 w14: label" in printed
