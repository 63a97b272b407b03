"""Trains and evaluates one classifier: `python -m experiments.run --flagfile=FILE --workdir=DIR`.

Flagfiles compose, and the last flag wins: `--flagfile=experiments/flags/data/wordnet.cfg
--flagfile=experiments/flags/cells/dense.cfg` is the dense classifier on the shipped data set.

The working directory receives `result.json`, `metrics.jsonl` (a line per epoch), `flags.cfg` (the flags that
repeat the run), the model and what encodes its text. A run that was stopped goes on from its last checkpoint
when it is started again with the same flags.
"""

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from flax import nnx
from tqdm import tqdm

from experiments import datasets, environment
from sparse_xmc.checkpoints import Checkpoints, save_model
from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batches
from sparse_xmc.evaluation import evaluate, evaluate_groups, gradient_density
from sparse_xmc.losses import LOSSES
from sparse_xmc.metrics import PROPENSITY_CONSTANTS, inverse_propensities, label_groups
from sparse_xmc.models import OUTPUT_DTYPES, OUTPUT_LAYERS, Classifier, ClassifierConfig
from sparse_xmc.rewire import GROWTHS, RewireConfig
from sparse_xmc.training import (
    MOMENTS,
    OPTIMIZERS,
    PAPER_EPSILON,
    SCHEDULES,
    Plateau,
    Trainer,
    TrainingConfig,
)

FLAGS = flags.FLAGS

# Flags that change no result, so that a run may go on with others.
INCIDENTAL_FLAGS = ("workdir", "name", "checkpoint_minutes")

# What a result keeps of each epoch's record.
_HISTORY = ("epoch", "loss", "seconds", "learning_rate", "p@1", "p@3", "p@5", "gradient_density")

# How many training batches the density of the gradient is measured on, after each epoch.
_DENSITY_BATCHES = 4

flags.DEFINE_string("workdir", None, "Directory for results and checkpoints.")
flags.DEFINE_integer("seed", 0, "Seed of everything random.")
flags.DEFINE_string("name", "", "The name of the run in tables; by default that of the working directory.")

flags.DEFINE_string("train", None, "Training points: .tsv (labels<TAB>text) or the repository's .txt.")
flags.DEFINE_string("test", None, "Test points, in the same format.")
flags.DEFINE_string("train_features", None, "Dense features of the training points, .npy float32 [N, D].")
flags.DEFINE_string("test_features", None, "Dense features of the test points.")
flags.DEFINE_string(
    "train_filter", None, "Labels to leave out when training points are ranked: lines of `row label`."
)
flags.DEFINE_string("test_filter", None, "The same for test points.")
flags.DEFINE_string("cache_dir", None, "Where parsed .txt files are kept and memory-mapped.")
flags.DEFINE_enum(
    "propensities", "default", list(PROPENSITY_CONSTANTS), "The family of data sets, for PSP@k."
)
flags.DEFINE_float("validation_fraction", 0.02, "The part of the training points held out for validation.")
flags.DEFINE_bool("validate_on_test", False, "Validate on the test set, as the paper does.")

flags.DEFINE_enum("output_layer", "fixed_fan_in", OUTPUT_LAYERS, "The output layer.")
flags.DEFINE_integer("fan_in", 32, "Inputs of each label (of an unstructured layer: on average).")
flags.DEFINE_integer("penultimate", 8192, "Width of the penultimate layer; 0 for none.")
flags.DEFINE_integer("embedding", 512, "Size of the word embeddings, for sparse features.")
flags.DEFINE_float("dropout", 0.1, "Dropout rate on the input features.")
flags.DEFINE_float("output_bias", 0.0, "Where the output layer's bias starts.")
flags.DEFINE_float(
    "output_bound", None, "The output kernel starts in +- this; by default as in the paper's code."
)
flags.DEFINE_enum("output_dtype", "float32", OUTPUT_DTYPES, "The type of the output layer's parameters.")

flags.DEFINE_enum("loss", "squared_hinge", list(LOSSES), "The loss.")
flags.DEFINE_integer("epochs", 100, "The most epochs to train.")
flags.DEFINE_integer("batch_size", 32, "Batch size.")
flags.DEFINE_float("learning_rate", 1e-3, "Adam's learning rate.")
flags.DEFINE_float("embedding_rate", 1.0, "The embedding learns at this times the learning rate.")
flags.DEFINE_float("penultimate_rate", 1.0, "The penultimate layer learns at this times the learning rate.")
flags.DEFINE_float("output_rate", 1.0, "The output layer learns at this times the learning rate.")
flags.DEFINE_enum("output_optimizer", "adam", OPTIMIZERS, "The optimizer of the output layer.")
flags.DEFINE_enum("moments", "float32", MOMENTS, "What Adam keeps of the penultimate layer.")
flags.DEFINE_float("epsilon", PAPER_EPSILON, "Adam's epsilon.")
flags.DEFINE_enum("schedule", "plateau", SCHEDULES, "How the learning rate falls; see TrainingConfig.")
flags.DEFINE_float("rewire_fraction", 0.1, "The part of the connections that a rewiring moves; 0 for never.")
flags.DEFINE_integer("rewire_interval", 1000, "Steps from rewiring to rewiring; -1 for once an epoch.")
flags.DEFINE_bool(
    "rewire_distinct", True, "Never give a label the same input twice, at the start or when rewiring."
)
flags.DEFINE_bool("rewire_zero", True, "Moved connections start at weight 0.")
flags.DEFINE_enum(
    "rewire_growth",
    "random",
    GROWTHS,
    "Where connections move: anywhere, or to inputs that a label's point has.",
)
flags.DEFINE_float(
    "checkpoint_minutes", 10, "Save the whole state when an epoch ends and this much time has passed."
)


def main(argv):
    """Runs the experiment that the flags describe."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every step of every save
    workdir = Path(FLAGS.workdir)
    _check_flags(workdir / "flags.cfg")
    if (workdir / "result.json").exists():
        print(f"{workdir / 'result.json'} is there already. Choose another --workdir to run again.")
        return

    splits = datasets.load(
        FLAGS.train,
        FLAGS.test,
        train_features=FLAGS.train_features,
        test_features=FLAGS.test_features,
        train_filter=FLAGS.train_filter,
        test_filter=FLAGS.test_filter,
        cache_dir=FLAGS.cache_dir,
    )
    train, validation = _hold_out(splits.train, splits.test)
    model_config, training_config = _model_config(splits.train), _training_config()

    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "flags.cfg").write_text("".join(f"{line}\n" for line in _flag_lines()))
    splits.save_encoders(workdir)
    (workdir / "model.json").write_text(json.dumps(dataclasses.asdict(model_config), indent=2) + "\n")

    memory = environment.PeakMemory()
    trainer = Trainer(Classifier(model_config, rngs=nnx.Rngs(FLAGS.seed)), training_config, seed=FLAGS.seed)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        epochs = _train(trainer, train, validation, checkpoints, workdir)
    model = trainer.model
    save_model(workdir / "model", model)

    weights = inverse_propensities(splits.train.labels, *PROPENSITY_CONSTANTS[FLAGS.propensities])
    print("evaluating on the test and training points ...", flush=True)
    options = {"inv_propensities": weights, "batch_size": FLAGS.batch_size}
    metrics = {
        "test": evaluate(model, splits.test, **options),
        "train": evaluate(model, train, **options),
    }
    groups = label_groups(splits.train.labels)
    result = {
        "name": FLAGS.name or workdir.name,
        **metrics,
        "test_p@1_by_group": evaluate_groups(model, splits.test, groups, batch_size=FLAGS.batch_size),
        "labels_by_group": np.bincount(groups, minlength=3).tolist(),
        "validated_on": "test" if FLAGS.validate_on_test else f"{len(validation)} held-out training points",
        "epochs": len(epochs),
        "train_seconds": sum(e["seconds"] for e in epochs),
        "seconds_per_epoch": float(np.median([e["seconds"] for e in epochs])),
        "peak_memory_bytes": memory.bytes(),
        "peak_memory_measured_as": memory.method,
        "model_bytes": sum(a.nbytes for a in jax.tree.leaves(trainer.state["params"])) + _index_bytes(model),
        "model": dataclasses.asdict(model_config),
        "training": dataclasses.asdict(training_config),
        "flags": {flag.name: flag.value for flag in _own_flags()},
        "seed": FLAGS.seed,
        "environment": environment.describe(),
        "history": [{name: r[name] for name in _HISTORY if name in r} for r in epochs],
    }
    _print_table(result)
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {workdir / 'result.json'}")


def _train(
    trainer: Trainer, train: Dataset, validation: Dataset, checkpoints: Checkpoints, workdir: Path
) -> list[dict]:
    """Trains until the schedule ends, and returns the record of each epoch."""
    config = trainer.config
    batches = Batches(train, config.batch_size)
    plateau = Plateau(config.learning_rate) if config.schedule == "plateau" else None
    records = []
    if progress := checkpoints.restore_latest(trainer):
        records = progress["records"]
        plateau = plateau and Plateau(**progress["plateau"])
        print(f"going on after epoch {len(records)}, from {workdir / 'checkpoints'}")
    saved = time.monotonic()

    while len(records) < config.epochs and not (plateau and plateau.should_stop):
        epoch = len(records)
        rate = plateau.learning_rate if plateau else None
        total = config.epochs * batches.steps_per_epoch

        def learning_rate(step, rate=rate, start=epoch * batches.steps_per_epoch, total=total):
            return rate or config.learning_rate * (1 - (start + step) / total)

        loss, seconds = _train_epoch(trainer, batches, epoch, learning_rate)
        metrics = evaluate(trainer.model, validation, batch_size=config.batch_size)
        record = {
            "epoch": epoch + 1,
            "loss": loss,
            "seconds": seconds,
            "learning_rate": learning_rate(0),
            **metrics,
        }
        if config.loss == "squared_hinge":  # any other loss has a gradient everywhere
            first = itertools.islice(batches.shuffled(trainer.seed, epoch + 1), _DENSITY_BATCHES)
            record["gradient_density"] = gradient_density(trainer.model, first)
        records.append(record)
        print(
            f"epoch {epoch + 1:3d}  loss {loss:.3e}  validation P@1/3/5 {_p_at(metrics)}  {seconds:.1f} s",
            flush=True,
        )
        if plateau:
            plateau.update(metrics["p@3"])
            if plateau.epochs_since_best == 0:
                checkpoints.save_best(trainer)
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if time.monotonic() - saved > 60 * FLAGS.checkpoint_minutes:
            progress = {"records": records, "plateau": dataclasses.asdict(plateau) if plateau else None}
            checkpoints.save_latest(trainer, progress)
            saved = time.monotonic()

    if plateau:
        checkpoints.restore_best(trainer)
    return records


def _train_epoch(trainer, batches, epoch, learning_rate) -> tuple[float, float]:
    """Trains one epoch under a progress bar; returns the mean loss and the seconds."""
    start = time.monotonic()
    losses = []
    with tqdm(
        total=batches.steps_per_epoch * batches.batch_size,
        desc=f"epoch {epoch + 1}",
        unit=" points",
        leave=False,
        disable=not sys.stderr.isatty(),
    ) as bar:
        for loss in trainer.epoch(batches, epoch, learning_rate):
            losses.append(loss)
            # Waiting for a loss of some steps ago bounds the queue without emptying it.
            if len(losses) % 10 == 0:
                bar.set_postfix(loss=f"{float(losses[-10]):.3e}", refresh=False)
                bar.update(10 * batches.batch_size)
    return float(np.mean(jax.device_get(losses))), time.monotonic() - start


def _hold_out(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """The points to train on and those to validate on."""
    if FLAGS.validate_on_test:
        print("validation is on the test set, as in the paper: with --schedule=plateau it chooses the epoch")
        return train, test
    if not 0 < FLAGS.validation_fraction < 1:
        raise ValueError(f"--validation_fraction must be between 0 and 1, got {FLAGS.validation_fraction}")
    order = np.random.default_rng(FLAGS.seed).permutation(len(train))
    held_out = max(1, round(FLAGS.validation_fraction * len(train)))
    return train.take(np.sort(order[held_out:])), train.take(np.sort(order[:held_out]))


def _model_config(dataset: Dataset) -> ClassifierConfig:
    return ClassifierConfig(
        num_features=dataset.num_features,
        num_labels=dataset.num_labels,
        bag_of_words=not isinstance(dataset.features, np.ndarray),
        embedding=FLAGS.embedding,
        dropout=FLAGS.dropout,
        penultimate=FLAGS.penultimate,
        output_layer=FLAGS.output_layer,
        fan_in=FLAGS.fan_in,
        output_bias=FLAGS.output_bias,
        output_bound=FLAGS.output_bound,
        distinct=FLAGS.rewire_distinct,
        output_dtype=FLAGS.output_dtype,
    )


def _training_config() -> TrainingConfig:
    rewire = RewireConfig(
        FLAGS.rewire_fraction, FLAGS.rewire_distinct, FLAGS.rewire_zero, FLAGS.rewire_growth
    )
    return TrainingConfig(
        epochs=FLAGS.epochs,
        batch_size=FLAGS.batch_size,
        loss=FLAGS.loss,
        learning_rate=FLAGS.learning_rate,
        embedding_rate=FLAGS.embedding_rate,
        penultimate_rate=FLAGS.penultimate_rate,
        output_rate=FLAGS.output_rate,
        output_optimizer=FLAGS.output_optimizer,
        moments=FLAGS.moments,
        epsilon=FLAGS.epsilon,
        schedule=FLAGS.schedule,
        rewire=rewire if FLAGS.rewire_fraction else None,
        rewire_interval=FLAGS.rewire_interval,
    )


def _own_flags() -> list[flags.Flag]:
    return FLAGS.flags_by_module_dict()[sys.argv[0]]


def _flag_lines() -> list[str]:
    return [flag.serialize() for flag in _own_flags() if flag.value is not None]


def _check_flags(path: Path) -> None:
    """Raises if a run with other flags began in this directory; flags that change no result may differ."""

    def that_matter(lines):
        return {line for line in lines if not line.startswith(tuple(f"--{n}=" for n in INCIDENTAL_FLAGS))}

    if not path.exists():
        return
    theirs = path.read_text().splitlines()
    if different := sorted(that_matter(theirs) ^ that_matter(_flag_lines())):
        raise ValueError(
            f"{path} belongs to a run with other flags ({' '.join(different)}); choose another --workdir"
        )


def _index_bytes(model: Classifier) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))))


def _p_at(metrics: dict) -> str:
    return "/".join(f"{100 * metrics[f'p@{k}']:.2f}" for k in (1, 3, 5))


def _print_table(result: dict) -> None:
    names = [name for name in result["test"] if name in result["train"]]
    print(f"\n{'metric':10s}{'test':>8s}{'train':>8s}")
    for name in names:
        print(f"{name:10s}{100 * result['test'][name]:8.2f}{100 * result['train'][name]:8.2f}")
    print(
        f"\n{result['epochs']} epochs, {result['train_seconds']:.0f} s in training "
        f"({result['seconds_per_epoch']:.1f} s per epoch), model {result['model_bytes'] / 2**20:.0f} MiB, "
        f"peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB ({result['peak_memory_measured_as']})"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "train", "test"])  # not on import: `experiments.sweep` has none
    app.run(main)
