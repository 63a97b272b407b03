"""Tests of `experiments.measure.direct_inputs` at small sizes."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

import xla_ops
from experiments.measure import direct_inputs
from experiments.measure.problems import Shape

SHAPE = Shape(labels=300, inputs=40, fan_in=4, batch=20, density=0.1)
VOCABULARY = 1000


@pytest.fixture(scope="module")
def layers_and_batch():
    return direct_inputs.make_layers(SHAPE, VOCABULARY, np.random.default_rng(0))


def test_draw_words_returns_distinct_words_by_frequency():
    words = direct_inputs.draw_words(np.random.default_rng(0), 2000, 10, VOCABULARY)
    assert words.min() == 0
    assert 900 < words.max() < VOCABULARY
    assert all(len(np.unique(row)) == 10 for row in words)
    frequencies = np.bincount(words.reshape(-1), minlength=VOCABULARY) / 2000
    # A draw is word 0 with probability log(2) / log(1001), so most texts of ten words contain it.
    assert 0.5 < frequencies[0] < 1
    assert frequencies[0] > frequencies[9] > frequencies[99] > frequencies[500:].mean()
    permutations = direct_inputs.draw_words(np.random.default_rng(0), 3, 20, 20)
    np.testing.assert_array_equal(np.sort(permutations, axis=1), np.tile(np.arange(20), (3, 1)))


def test_draw_words_offset_reduces_frequent_words():
    rng = np.random.default_rng(0)
    text_words = direct_inputs.draw_words(rng, 1000, 10, VOCABULARY)
    label_words = direct_inputs.draw_words(rng, 1000, 10, VOCABULARY, offset=50)
    assert np.mean(label_words < 20) < 0.5 * np.mean(text_words < 20)


def test_draw_texts_lengths_and_vocabulary():
    texts = direct_inputs.draw_texts(np.random.default_rng(0), 256, 100_000)
    assert 1400 < len(np.unique(texts.columns)) < 1600
    counts = np.bincount(texts.rows, minlength=256)
    assert counts.min() >= 1
    assert 9 < counts.mean() < 11
    lengths = np.bincount(texts.rows, np.asarray(texts.values) ** 2, minlength=256)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_make_layers_shapes_and_indices(layers_and_batch):
    layers, x, _ = layers_and_batch
    assert list(layers) == ["4 units", "4 units + 4 words", "8 units"]
    assert x.shape == (20, 40)
    for layer, (units, words) in zip(layers.values(), ((4, 0), (4, 4), (8, 0)), strict=True):
        indices = np.asarray(layer.indices)
        assert indices.shape == layer.held[0].shape == (300, units + words)
        assert np.all(indices[:, :units] < 40)
        assert np.all((indices[:, units:] >= 40) & (indices[:, units:] < 40 + VOCABULARY))
        assert (layer.sparse is None) == (words == 0)


def test_make_layers_logits_have_requested_density(layers_and_batch):
    layers, x, _ = layers_and_batch
    for layer in layers.values():
        kernel, bias, _ = layer.held
        logits = xla_ops.fan_in_matmul(x, kernel, layer.indices, bias, sparse=layer.sparse)
        assert 0.05 < np.mean(np.asarray(logits) > -1) < 0.2


def test_measure_reports_medians_and_ratios():
    report = direct_inputs.measure(SHAPE, VOCABULARY, repeats=3, now=itertools.count().__next__)
    names = ("4 units", "4 units + 4 words", "8 units")
    assert report["median_seconds"] == {op: dict.fromkeys(names, 1.0) for op in direct_inputs.OPS}
    assert report["over_units_alone"] == {op: dict.fromkeys(names[1:], 1.0) for op in direct_inputs.OPS}
    table = direct_inputs.table(report)
    assert table.count("1,000.0 (1.00)") == 6
    assert f"{report['words']['different']:,} of 1,000 words in the batch" in table
    assert 0 < report["words"]["part_of_labels_words"] < 1


def test_program_writes_report(tmp_path):
    path = tmp_path / "result.json"
    sizes = {**SHAPE._asdict(), "vocabulary": VOCABULARY}
    command = [sys.executable, "-m", "experiments.benchmark", "--op=direct_inputs", "--repeats=1"]
    command += [*(f"--{name}={size}" for name, size in sizes.items()), f"--json={path}"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "4 units + 4 words" in printed
    report = json.loads(path.read_text())
    assert report["shape"] == SHAPE._asdict()
    assert report["vocabulary"] == VOCABULARY
    assert all(s > 0 for seconds in report["median_seconds"].values() for s in seconds.values())
