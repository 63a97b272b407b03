"""Train and evaluate one classifier: `sparse-xmc run --flagfile=FILE --workdir=DIR`.

Flagfiles compose, and the last value of a flag is used: `--flagfile=wordnet --flagfile=dense` trains the
dense classifier on the shipped data set. A flagfile is given by its path, or by its name in
`sparse_xmc/cli/flags`.

The working directory receives `result.json`, `metrics.jsonl` (one line per epoch), `flags.cfg` (the flags
that repeat the run) and the saved model with its encoders of texts and labels. A stopped run is resumed from
its last checkpoint when it is started again with the same flags. With --schedule=plateau, --epochs may be
increased, also after a run has finished. Ctrl-C and SIGTERM stop the run after the current step, once its
state is saved, with exit status 130 and 143.
"""

import dataclasses
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from sparse_xmc.assembly import build, finish
from sparse_xmc.cli import datasets, environment, program, reflection, run_directory, run_flags
from sparse_xmc.cli.memory import PeakMemory
from sparse_xmc.cli.messages import print_once, print_result, print_sizes, print_unused_encoder_flags
from sparse_xmc.data import Dataset
from sparse_xmc.data.files import write_text
from sparse_xmc.data.tokens import Tokenizer
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.encoders.frozen_encoder import FrozenEncoder, open_pretrained
from sparse_xmc.evaluation import evaluate, evaluate_groups
from sparse_xmc.heads import HEADS
from sparse_xmc.mesh import connect, make_mesh, parse_mesh
from sparse_xmc.metrics import PROPENSITY_CONSTANTS, LabelStatistics
from sparse_xmc.model import Classifier, ClassifierConfig
from sparse_xmc.modules import count_parameters
from sparse_xmc.planning import check_memory, plan_memory
from sparse_xmc.saving import SavedModel
from sparse_xmc.train import Checkpoints, GradientDensity, Progress, RecordFile, Stopped, fit

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(run_flags)  # so that --help shows them

# Fields of each epoch's record that are kept in a result.
_HISTORY = ("epoch", "loss", "seconds", "learning_rate", "p@1", "p@3", "p@5", "gradient_density")


def main():
    """Train and evaluate the classifier that the flags describe."""
    mesh = _open_mesh()
    is_first = jax.process_index() == 0  # Only the first process writes and prints.
    workdir = Path(FLAGS.workdir)
    if not FLAGS.plan:  # A plan neither uses nor changes the working directory.
        run_directory.check_flags(workdir)
        if message := run_directory.finished(workdir):
            print_once(message)
            return
    values = run_flags.current_values()
    settings = run_flags.Settings.of(values)
    training = settings.training
    if unused := reflection.fields_of_other_kinds("head", HEADS, values):
        print_once(f"--head={FLAGS.head} does not use {', '.join(f'--{name}' for name in unused)}")

    pretrained, network = _open_encoder()
    splits = datasets.load(
        FLAGS.train,
        FLAGS.test,
        train_features=FLAGS.train_features,
        test_features=FLAGS.test_features,
        train_filter=FLAGS.train_filter,
        test_filter=FLAGS.test_filter,
        cache_dir=FLAGS.cache_dir,
        ngrams=FLAGS.ngrams,
        pretrained=pretrained,
    )
    train, validation = _hold_out(splits)
    print_sizes(splits, validation)
    config = ClassifierConfig.for_data(train, settings.encoder, settings.head, network)
    plan = plan_memory if FLAGS.plan else check_memory
    memory_plan = plan(config, training, train, mesh=mesh)
    if FLAGS.plan:
        print_once(str(memory_plan))
        return
    planned, available = (f"{size / 2**20:,.0f} MiB" for size in (memory_plan.bytes, memory_plan.available))
    print_once(f"planned memory {planned}, of {available} available on {memory_plan.device}")
    workdir.mkdir(parents=True, exist_ok=True)
    if is_first:
        lock = run_directory.lock(workdir)  # noqa: F841  # held until the process ends
        write_text(workdir / "flags.cfg", "".join(f"{line}\n" for line in run_flags.flag_lines()))

    memory = PeakMemory()
    initial = None if FLAGS.init_from is None else SavedModel.load(FLAGS.init_from, mesh=mesh)
    saved, trainer = build(
        config,
        training,
        train,
        inputs=splits.inputs,
        label_encoder=splits.label_encoder,
        network=network,
        initial=initial,
        mesh=mesh,
        seed=FLAGS.seed,
    )
    del initial
    print_once(f"{count_parameters(saved.model):,} parameters")
    records = workdir / "metrics.jsonl"
    with Checkpoints(workdir / "checkpoints") as checkpoints, _Signals() as signals:
        epochs = _fit_or_exit(
            signals,
            trainer,
            train,
            validation,
            checkpoints=checkpoints,
            checkpoint_minutes=FLAGS.checkpoint_minutes,
            callbacks=[GradientDensity(), *([Progress(), RecordFile(records)] if is_first else [])],
        )
    statistics = LabelStatistics.of(splits.train.labels, *PROPENSITY_CONSTANTS[FLAGS.propensities])
    finish(saved, trainer, statistics=statistics, validation=validation)
    result = {
        "name": FLAGS.name or workdir.name,
        **_evaluate(saved.model, train, splits.test, statistics, training.batch_size),
        "labels_in_training": int(np.count_nonzero(splits.train.label_counts())),
        "validated_on": "test" if FLAGS.validate_on_test else f"{len(validation)} held-out training points",
        "epochs": len(epochs),
        "train_seconds": sum(e["seconds"] for e in epochs),
        "seconds_per_epoch": float(np.median([e["seconds"] for e in epochs])),
        "peak_memory_bytes": memory.bytes(),
        "peak_memory_measured_as": memory.method,
        "planned_memory_bytes": memory_plan.bytes,
        "model_bytes": sum(a.nbytes for a in jax.tree.leaves(nnx.state(saved.model, nnx.Not(nnx.RngState)))),
        "model": config.to_json(),
        "training": dataclasses.asdict(training),
        "flags": values,
        "seed": FLAGS.seed,
        "environment": environment.describe(),
        "history": [{name: r[name] for name in _HISTORY if name in r} for r in epochs],
    }
    data = {"training points": FLAGS.train, "test points": FLAGS.test, "seed": FLAGS.seed}
    saved.save(workdir, data=data, metrics=result["test"])
    if not is_first:
        return
    write_text(workdir / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    print_result(result)
    print(f"\nwrote {workdir / 'result.json'}")


class _Signals:
    """A context that stores the first SIGINT or SIGTERM in `received`; a second one ends the process."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "_Signals":
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
        print(
            "stopping after this step; send the signal again to stop immediately", file=sys.stderr, flush=True
        )


def _fit_or_exit(signals: _Signals, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
    """Run `fit`; after a signal, exit with status 128 plus the number of the signal, with saved state."""
    try:
        return fit(*arguments, **options, should_stop=lambda: signals.received > 0)
    except Stopped as stopped:
        print_once(f"{stopped}; run the same command to resume")
        sys.exit(128 + signals.received)


def _open_mesh() -> Mesh | None:
    """Connect the processes, and return the mesh that the flags describe, or None."""
    if FLAGS.coordinator is not None:
        address = None if FLAGS.coordinator == "auto" else FLAGS.coordinator
        connect(address, FLAGS.num_processes, FLAGS.process_id)
    elif FLAGS.num_processes is not None or FLAGS.process_id is not None:
        raise ValueError("--num_processes and --process_id need --coordinator")
    if FLAGS.mesh is not None:
        return make_mesh(**parse_mesh(FLAGS.mesh))
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes need --mesh, such as label:{jax.device_count()}")
    return None


def _open_encoder() -> tuple[FrozenEncoder | Tokenizer | None, PretrainedEncoder | None]:
    """Open the pretrained encoder that the flags name.

    Returns:
      The encoding of texts for it: the encoder itself if it is frozen, else its tokenizer; None without an
        encoder.
      The network if it is fine-tuned, else None.
    """
    trainable = FLAGS.encoder_trainable
    if trainable and FLAGS.encoder is None:
        raise ValueError("--encoder_trainable needs --encoder")
    print_unused_encoder_flags()
    if FLAGS.encoder is None:
        return None, None
    pretrained = open_pretrained(FLAGS.encoder, trainable=trainable, max_length=FLAGS.max_length)
    if not trainable:
        return pretrained, None
    dtype = jnp.dtype(FLAGS.encoder_dtype)
    return pretrained, PretrainedEncoder.from_directory(FLAGS.encoder, dtype=dtype, remat=FLAGS.encoder_remat)


def _evaluate(
    model: Classifier, train: Dataset, test: Dataset, statistics: LabelStatistics, batch_size: int
) -> dict[str, Any]:
    """Return the metrics on the training and test points, and the number of labels of each group."""
    print_once("evaluating on the test and training points ...")
    metrics = {
        name: evaluate(model, points, inv_propensities=statistics.inv_propensities, batch_size=batch_size)
        for name, points in (("test", test), ("train", train))
    }
    groups = statistics.groups
    return metrics | {
        "test_p@1_by_group": evaluate_groups(model, test, groups, batch_size=batch_size),
        "labels_by_group": np.bincount(groups, minlength=3).tolist(),
    }


def _hold_out(splits: datasets.Splits) -> tuple[Dataset, Dataset]:
    """Return the training and the validation points."""
    if FLAGS.validate_on_test:
        print_once(
            "validating on the test set, as in the paper; with --schedule=plateau, it also selects the epoch"
        )
        return splits.train, splits.test
    return splits.train.hold_out(FLAGS.validation_fraction, FLAGS.seed)


if __name__ == "__main__":
    # Not on import, because `plan` does not need these flags.
    flags.mark_flags_as_required(["workdir", "train", "test"])
    program.start(main)
