"""What the measurements have in common: settings from flags, networks, trainers."""

import numpy as np
import pytest
from absl import flags

from experiments.measure import workloads
from experiments.measure.workloads import MODES, NETWORKS, SCALES, make_batches, make_trainer, read_settings
from sparse_xmc.cli.run_flags import unused_flags
from sparse_xmc.heads import DenseConfig, FixedFanInConfig
from sparse_xmc.train import TrainingConfig

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_settings_are_those_of_a_run_with_these_arguments():
    settings = read_settings(["--head=dense", "--output_bias=-1", "--dropout=0.5", "--epsilon=1e-9"])
    assert settings.head == DenseConfig(output_bias=-1.0)
    assert settings.encoder.dropout == 0.5
    assert settings.training == TrainingConfig(epsilon=1e-9)
    assert read_settings([]).head == FixedFanInConfig()
    config = settings.classifier(12, 34)
    assert (config.num_features, config.num_labels, config.head) == (12, 34, settings.head)


def test_an_unknown_argument_is_an_error():
    with pytest.raises(flags.UnrecognizedFlagError, match="colour"):
        read_settings(["--colour=red"])


def test_what_the_program_was_given_does_not_reach_the_settings(monkeypatch):
    flag = flags.FLAGS["fan_in"]
    assert unused_flags() == []
    try:
        flag.parse("5")
        flag.present += 1  # as absl does
        assert read_settings([]).head.fan_in == 32
        assert unused_flags() == ["fan_in"]
        assert unused_flags("fan_in") == []
    finally:
        flag.unparse()


def test_lean_is_what_its_flagfile_says():
    lean = read_settings(MODES["lean"])
    assert (lean.head.output_dtype, lean.training.output_optimizer) == ("bfloat16", "sgd")
    assert lean.training.moment_dtype == "bfloat16"
    assert read_settings(MODES["adam"]).training == TrainingConfig()


def test_a_networks_trainer_has_its_sizes_and_arguments():
    network = NETWORKS[0]._replace(labels=1000, fan_in=3, penultimate=20, features=16)
    trainer = network.trainer("adam", "--output_bias=-2", "--epsilon=1e-12")
    layers = trainer.state["params"]["head"]
    assert layers["penultimate"]["kernel"].shape == (16, 20)
    assert layers["output"]["kernel"].shape == (1000, 3)
    np.testing.assert_array_equal(layers["output"]["bias"][...], -2)
    assert (trainer.config.batch_size, trainer.config.epsilon) == (32, 1e-12)
    (batch,) = network.batches(1)
    assert batch.inputs.shape == (32, 16)
    assert np.isfinite(trainer.train_step(batch, 1e-3))


def test_steps_take_the_batches_in_turn(monkeypatch):
    batches = make_batches(1000, 2.0, 16, count=2, size=4)
    trainer = make_trainer(["--head=dense"], 16, 1000)
    seen = []
    monkeypatch.setattr(trainer, "train_step", lambda *arguments: seen.append(arguments))
    step = workloads.stepper(trainer, batches, 0.5)
    for trainer.step in range(3):
        assert step() is trainer.state
    expected = [batches[0], batches[1], batches[0]]
    assert all(batch is other for (batch, _), other in zip(seen, expected, strict=True))
    assert {rate for _, rate in seen} == {0.5}


def test_data_sets_have_their_published_sizes():
    by_name = {scale.name: scale for scale in SCALES}
    assert by_name["Amazon-670K"] == ("Amazon-670K", 670_091, 5.45, 490_449)
    assert [scale.labels for scale in SCALES] == sorted(scale.labels for scale in SCALES)
    assert [network[:5] for network in NETWORKS] == [
        ("Amazon-670K", 670_091, 32, 32_768, 1.45),
        ("Amazon-670K", 670_091, 64, 100_000, 2.91),
        ("Amazon-3M", 2_812_281, 64, 131_072, 8.67),
        ("Paper2Keywords", 8_623_847, 32, 65_536, None),
    ]
