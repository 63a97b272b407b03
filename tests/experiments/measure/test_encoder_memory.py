"""Tests of the planned memory of training steps with an encoder, at a size where real arrays can be made."""

import csv
import json
import subprocess
import sys

import jax
import pytest
from flax import nnx

from experiments import published
from experiments.measure import encoder_memory
from sparse_xmc import planning
from sparse_xmc.encoders.pretrained_files import PretrainedConfig

TINY = encoder_memory.Shape(
    labels=300, fan_in=8, penultimate=32, vocabulary=100, batch=4, tokens=8, embedding=8, labels_per_point=2.0
)
NETWORK = PretrainedConfig("bert", 50, 16, 1, 2, 32, max_position_embeddings=16)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_abstract_trainer_matches_real_arrays(monkeypatch):
    trainer = encoder_memory.abstract_trainer(TINY, NETWORK, "float32", False)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trainer.state))
    parts = planning.state_parts(trainer)
    monkeypatch.setattr(nnx, "eval_shape", lambda function: function())
    real = encoder_memory.abstract_trainer(TINY, NETWORK, "float32", False)
    assert planning.state_parts(real) == parts
    arrays = [a for a in jax.tree.leaves(real.state) if isinstance(a, jax.Array)]
    assert sum(parts.values()) == sum(a.size * a.dtype.itemsize for a in arrays)
    weights = sum(a.nbytes for a in jax.tree.leaves(nnx.state(real.model.encoder.text, nnx.Param)))
    assert weights <= parts["encoder"] < weights + 500
    assert 1.5 * weights <= parts["encoder's moments"] < 1.5 * weights + 500  # the first moments are bfloat16
    table_bytes = 100 * (8 + 1) * 4  # with a sum of squares for each row
    assert table_bytes <= parts["embedding tables"] < table_bytes + 100
    batch = encoder_memory.make_batch(TINY, NETWORK)
    loss = real.train_step(batch, 1e-3)  # The planned step can be run.
    assert float(loss) > 0


def test_plan_sums_arguments_and_temporaries():
    row = encoder_memory.plan(TINY, NETWORK, "float32", False)
    parts = row["argument_parts_bytes"]
    assert (
        sum(parts.values()) <= row["argument_bytes"] < sum(parts.values()) + 20_000
    )  # The arguments include the batch.
    assert row["bytes"] == row["argument_bytes"] + row["temporary_bytes"] + row["new_result_bytes"]
    assert 0 <= row["new_result_bytes"] < 20_000
    assert row["temporary_bytes"] > parts["encoder"]  # The temporaries include the gradients.


@pytest.mark.plan_for_cpus
def test_remat_reduces_memory():
    shape = TINY._replace(batch=64, tokens=16)
    network = PretrainedConfig("bert", 50, 16, 4, 2, 64, max_position_embeddings=16)
    without_remat, with_remat = (
        encoder_memory.plan(shape, network, "float32", remat) for remat in (False, True)
    )
    for name in ("temporary_bytes", "kept_for_backward_bytes"):
        assert with_remat[name] < 0.6 * without_remat[name]
    assert with_remat["argument_bytes"] == without_remat["argument_bytes"]


def test_bytes_kept_is_smaller_in_bfloat16():
    shape = TINY._replace(batch=64, tokens=16)
    wide, narrow = (
        encoder_memory.bytes_kept(shape, NETWORK, dtype, False) for dtype in ("float32", "bfloat16")
    )
    assert 0.4 * wide < narrow < 0.8 * wide  # Norms and attention keep some values in float32.


def test_measure_returns_and_prints_report(capsys):
    report = encoder_memory.measure([TINY], NETWORK, [("bfloat16", True)])
    assert json.loads(json.dumps(report))["steps"][0]["labels"] == 300
    assert "300 labels, 4 x 8 tokens, bfloat16 with remat" in capsys.readouterr().out
    text = encoder_memory.table(report)
    assert "ELMO, FP8 3.55, ELMO, BF16 5.68, Renee, rerun by ELMO 11.91" in text


def test_published_numbers_match_csv():
    with open(published.END_TO_END, encoding="utf-8", newline="") as file:
        rows = [
            r for r in csv.DictReader(file) if (r["dataset"], r["encoder"]) == ("Amazon-670K", "BERT-base")
        ]
    found = {row["system"].replace("ELMO ", "ELMO, "): float(row["peak_memory_gib"]) for row in rows}
    assert {
        name.replace("by ELMO, ", "by ELMO "): gib for name, gib in found.items()
    } == encoder_memory.PUBLISHED


def test_program_rejects_unused_flags():
    command = [
        sys.executable,
        "-m",
        "experiments.benchmark",
        "--op=encoder_memory",
        "--density=1",
        "--steps=3",
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode != 0
    assert "--op=encoder_memory does not use --density, --steps" in finished.stdout + finished.stderr
