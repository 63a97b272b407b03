"""Train and evaluate one classifier: `python -m experiments.run --flagfile=FILE --workdir=DIR`.

Flagfiles compose, and the last value of a flag is used: `--flagfile=wordnet --flagfile=dense` trains the
dense classifier on the shipped data set. A flagfile is given by its path, or by its name in
`experiments/flags`.

The working directory receives `result.json`, `metrics.jsonl` (one line per epoch), `flags.cfg` (the flags
that repeat the run) and the saved model with its encoders of texts and labels. A stopped run is resumed from
its last checkpoint when it is started again with the same flags. With --schedule=plateau, --epochs may be
increased, also after a run has finished. Ctrl-C and SIGTERM stop the run after the current step, once its
state is saved, with exit status 130 and 143.
"""

import copy
import dataclasses
import fcntl
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from sparse_xmc.calibration import Calibration
from sparse_xmc.data import Dataset
from sparse_xmc.data.files import open_no_follow, write_text
from sparse_xmc.data.label_checks import shorten, warn_of_unusual_labels
from sparse_xmc.encoders.frozen_encoder import open_pretrained
from sparse_xmc.evaluation import evaluate, evaluate_groups
from sparse_xmc.heads import HEADS
from sparse_xmc.mesh import connect, make_mesh, parse_mesh
from sparse_xmc.metrics import PROPENSITY_CONSTANTS, LabelStatistics
from sparse_xmc.model import ClassifierConfig, EncoderConfig
from sparse_xmc.modules import count_parameters
from sparse_xmc.planning import check_memory, plan_memory
from sparse_xmc.saving import SavedModel
from sparse_xmc.train import (
    SCHEDULES,
    Checkpoints,
    GradientDensity,
    Progress,
    RecordFile,
    Stopped,
    Trainer,
    TrainingConfig,
    fit,
)

from . import datasets, flagfiles, program, reflection
from . import unstructured as unstructured  # registers a head
from .measure import environment
from .measure.memory import PeakMemory

FLAGS = flags.FLAGS

# Flags that do not affect results, so that a run may be resumed with other values of them.
INCIDENTAL_FLAGS = (
    "workdir",
    "plan",
    "name",
    "checkpoint_minutes",
    "mesh",
    "coordinator",
    "num_processes",
    "process_id",
)

# Fields of each epoch's record that are kept in a result.
_HISTORY = ("epoch", "loss", "seconds", "learning_rate", "p@1", "p@3", "p@5", "gradient_density")

flags.DEFINE_string("workdir", None, "Directory for results and checkpoints.")
flags.DEFINE_bool("plan", False, "Print the memory that training is planned to take, and do no more.")
flags.DEFINE_integer("seed", 0, "Seed of everything random.")
flags.DEFINE_string("name", "", "The name of the run in tables; by default that of the working directory.")

flags.DEFINE_string(
    "init_from", None, "The directory of a saved model, such as another run's, whose weights to start from."
)

flags.DEFINE_string("train", None, "Training points: .tsv (labels<TAB>text) or the repository's .txt.")
flags.DEFINE_string("test", None, "Test points, in the same format.")
flags.DEFINE_string("train_features", None, "Dense features of the training points, .npy float32 [N, D].")
flags.DEFINE_string("test_features", None, "Dense features of the test points.")
flags.DEFINE_string(
    "train_filter", None, "Labels to leave out when training points are ranked: lines of `row label`."
)
flags.DEFINE_string("test_filter", None, "The same for test points.")
flags.DEFINE_string("cache_dir", None, "Where parsed .txt files and embeddings are kept and memory-mapped.")
flags.DEFINE_integer(
    "ngrams", 1, "Of raw text: 1 for words alone, 2 for pairs of neighbouring words as well.", 1
)
flags.DEFINE_string(
    "encoder", None, "Directory of a pretrained encoder of raw text, as Hugging Face saves it, beside words."
)
flags.DEFINE_bool(
    "encoder_trainable",
    False,
    "Train it too, rather than compute its embeddings once; see text_encoder.cfg for rates.",
)
flags.DEFINE_enum(
    "encoder_dtype", "float32", ["float32", "bfloat16"], "What an encoder that is trained computes in."
)
flags.DEFINE_bool(
    "encoder_remat", False, "Compute the insides of its layers again in the backward pass: less memory."
)
flags.DEFINE_integer("max_length", 64, "How many tokens of a text --encoder reads.", 3)
flags.DEFINE_enum(
    "propensities", "default", list(PROPENSITY_CONSTANTS), "The family of data sets, for PSP@k."
)
flags.DEFINE_float(
    "validation_fraction", 0.02, "The part of the training points held out for validation.", 0, 1
)
flags.DEFINE_bool("validate_on_test", False, "Validate on the test set, as the paper does.")
flags.DEFINE_float("checkpoint_minutes", 10, "Save the whole state whenever this much time has passed.", 0)

flags.DEFINE_string(
    "mesh", None, 'Devices to split the labels over, and the batch, such as "data:2,label:4"; else one.'
)
flags.DEFINE_string(
    "coordinator", None, 'Of several processes: address:port of the first, or "auto" where JAX finds out.'
)
flags.DEFINE_integer("num_processes", None, "How many processes train together.", 1)
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", 0)

reflection.define_flags(EncoderConfig)
reflection.define_kinds("head", HEADS, "fixed_fan_in", "What is over the encoder's features.")
reflection.define_flags(TrainingConfig)
flags.adopt_module_key_flags(reflection)  # so that --help shows them


def main():
    """Run the experiment that the flags describe."""
    mesh = _open_mesh()
    is_first = jax.process_index() == 0  # Only the first process writes and prints.
    workdir = Path(FLAGS.workdir)
    _check_flags(workdir / "flags.cfg")
    if (note := _finished(workdir / "result.json")) is not None:
        _say(f"{workdir / 'result.json'} is there already{note}. Choose another --workdir to run again.")
        return
    values = {flag.name: flag.value for flag in own_flags()}
    head = reflection.read_kind("head", HEADS, values)
    training = reflection.read_flags(TrainingConfig, values)
    if unused := reflection.flags_without_use("head", HEADS, values):
        _say(f"--head={FLAGS.head} has no use for {', '.join(f'--{name}' for name in unused)}")

    if FLAGS.encoder_trainable and FLAGS.encoder is None:
        raise ValueError("--encoder_trainable needs --encoder")
    _tell_unused_of_encoder()
    pretrained, trained = None, None
    if FLAGS.encoder is not None:
        pretrained, trained = open_pretrained(
            FLAGS.encoder,
            trainable=FLAGS.encoder_trainable,
            max_length=FLAGS.max_length,
            cache_dir=FLAGS.cache_dir,
            dtype=FLAGS.encoder_dtype,
            remat=FLAGS.encoder_remat,
        )
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
    _tell_sizes(splits, validation)
    config = ClassifierConfig(
        num_features=train.num_features,
        num_labels=train.num_labels,
        bag_of_words=train.is_sparse,
        encoder=reflection.read_flags(EncoderConfig, values),
        head=head,
        **ClassifierConfig.beside_words(pretrained, trained),
    )
    plan = plan_memory if FLAGS.plan else check_memory
    memory_plan = plan(config, training, train, mesh=mesh)
    if FLAGS.plan:
        _say(str(memory_plan))
        return
    planned, available = (f"{size / 2**20:,.0f} MiB" for size in (memory_plan.bytes, memory_plan.available))
    _say(f"planned memory {planned}, of {available} available on {memory_plan.device}")
    workdir.mkdir(parents=True, exist_ok=True)
    if is_first:
        lock = _lock(workdir)  # noqa: F841  # held until the process ends
        write_text(workdir / "flags.cfg", "".join(f"{line}\n" for line in _flag_lines()))

    memory = PeakMemory()
    start = None if FLAGS.init_from is None else SavedModel.load(FLAGS.init_from, mesh=mesh)
    model = config.make(
        train=train if start is None else None, text=trained, mesh=mesh, rngs=nnx.Rngs(FLAGS.seed)
    )
    saved = SavedModel(config, model, splits.text_encoder, splits.label_encoder, pretrained)
    if start is not None:
        saved.start_from(start)
        del start
    _say(f"{count_parameters(model):,} parameters")
    trainer = Trainer(model, training, seed=FLAGS.seed)
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
    model = saved.model = trainer.model
    _say("evaluating on the test and training points ...")
    counts = splits.train.label_counts()
    constants = PROPENSITY_CONSTANTS[FLAGS.propensities]
    statistics = saved.label_statistics = LabelStatistics.of(splits.train.labels, *constants)
    saved.calibration = Calibration.fit(model, validation, batch_size=training.batch_size)
    options = {"inv_propensities": statistics.inv_propensities, "batch_size": training.batch_size}
    result = {
        "name": FLAGS.name or workdir.name,
        "test": evaluate(model, splits.test, **options),
        "train": evaluate(model, train, **options),
        "test_p@1_by_group": evaluate_groups(
            model, splits.test, statistics.groups, batch_size=training.batch_size
        ),
        "labels_by_group": np.bincount(statistics.groups, minlength=3).tolist(),
        "labels_in_training": int(np.count_nonzero(counts)),
        "validated_on": "test" if FLAGS.validate_on_test else f"{len(validation)} held-out training points",
        "epochs": len(epochs),
        "train_seconds": sum(e["seconds"] for e in epochs),
        "seconds_per_epoch": float(np.median([e["seconds"] for e in epochs])),
        "peak_memory_bytes": memory.bytes(),
        "peak_memory_measured_as": memory.method,
        "planned_memory_bytes": memory_plan.bytes,
        "model_bytes": sum(a.nbytes for a in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))),
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
    _print_table(result)
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

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        self.received = number
        self.__exit__()
        print("stopping after this step; once more to end at once", file=sys.stderr, flush=True)


def _fit_or_exit(signals: _Signals, *arguments, **options) -> list[dict[str, Any]]:
    """Run `fit`; after a signal, exit with status 128 plus the number of the signal, with saved state."""
    try:
        return fit(*arguments, **options, should_stop=lambda: signals.received > 0)
    except Stopped as stopped:
        _say(f"{stopped}; the same command goes on")
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


def _say(line: str) -> None:
    """Print a line, if this is the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def _tell_unused_of_encoder() -> None:
    """Print the given flags that have no effect without an encoder, or without fine-tuning it."""
    of_trained = ("encoder_dtype", "encoder_remat")
    unused = [name for name in of_trained if FLAGS[name].present and not FLAGS.encoder_trainable]
    of_any = ("text_scale", "text_dropout")
    unused += [name for name in of_any if FLAGS[name].present and FLAGS.encoder is None]
    if unused:
        what = "a frozen encoder" if FLAGS.encoder else "a run without --encoder"
        _say(f"{what} has no use for {', '.join(f'--{name}' for name in unused)}")


def _hold_out(splits: datasets.Splits) -> tuple[Dataset, Dataset]:
    """Return the training and the validation points."""
    if FLAGS.validate_on_test:
        _say("validation is on the test set, as in the paper: with --schedule=plateau it chooses the epoch")
        return splits.train, splits.test
    return splits.train.hold_out(FLAGS.validation_fraction, FLAGS.seed)


def _tell_sizes(splits: datasets.Splits, validation: Dataset) -> None:
    """Print the numbers of points, labels and features, and frequent labels; warn of odd labels."""
    train, test = splits.train, splits.test
    held_out = "" if FLAGS.validate_on_test else f", {len(validation):,} of them to validate on"
    _say(f"{len(train):,} training points{held_out}; {len(test):,} test points")
    unseen = f"; {splits.unseen_labels:,} that only test points have cannot be predicted"
    _say(f"{train.num_labels:,} labels{unseen if splits.unseen_labels else ''}")
    counts = train.label_counts()
    names = None if splits.label_encoder is None else splits.label_encoder.names
    most = [label for label in np.argsort(-counts, kind="stable")[:3] if counts[label]]
    listed = ", ".join(
        f"{datasets.printable(label if names is None else shorten(names[label]))} ({counts[label]:,})"
        for label in most
    )
    mean = train.labels.nnz / max(1, len(train))
    _say(f"{mean:.2f} labels per training point on average; most frequent: {listed or 'none'}")
    if jax.process_index() == 0:
        warn_of_unusual_labels(train.labels, names)
    what = "features" if splits.text_encoder is None else "words" + " and pairs of words" * (FLAGS.ngrams > 1)
    _say(f"{train.num_features:,} {what}")


def own_flags() -> list[flags.Flag]:
    """Return the flags of this program, even if another program imports it."""
    modules = FLAGS.flags_by_module_dict()
    return [*modules[sys.argv[0] if __name__ == "__main__" else __name__], *modules[reflection.__name__]]


def values_of(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of this program's flags for given arguments, independent of the command line."""
    values = flags.FlagValues()
    for flag in own_flags():
        values[flag.name] = copied = copy.deepcopy(flag)
        copied.unparse()
    values(["experiments.run", *flagfiles.expand(arguments)])
    return values.flag_values_dict()


def _flag_lines() -> list[str]:
    return [flag.serialize() for flag in own_flags() if flag.value is not None]


def _lock(workdir: Path) -> IO:
    """Lock a working directory for this process; the lock is held while the returned file is open."""
    file = open(workdir / ".lock", "w", opener=open_no_follow)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"{workdir}: another run is at work in it; choose another --workdir") from error
    return file


def _check_flags(path: Path) -> None:
    """Raise ValueError if the directory contains a run with other flags that affect results."""

    is_begun = any((path.parent / "checkpoints" / "latest").glob("*.json"))
    if not is_begun and not (path.parent / "result.json").exists():
        return  # There is no run to resume.

    def that_matter(lines):
        return {line for line in lines if not line.startswith(tuple(f"--{n}=" for n in INCIDENTAL_FLAGS))}

    if not path.exists():
        return
    theirs = flagfiles.rename_flags(path.read_text().splitlines())
    epochs = next((int(line[9:]) for line in theirs if line.startswith("--epochs=")), FLAGS.epochs)
    is_raised = epochs < FLAGS.epochs
    if is_raised:
        theirs = [*(line for line in theirs if not line.startswith("--epochs=")), f"--epochs={FLAGS.epochs}"]
    if different := sorted(that_matter(theirs) ^ that_matter(_flag_lines())):
        raise ValueError(
            f"{path} belongs to a run with other flags ({' '.join(different)}); choose another --workdir"
        )
    if is_raised and not SCHEDULES[FLAGS.schedule].can_go_on:
        raise ValueError(
            f"{path} is of a run of {epochs} epochs, at whose end --schedule={FLAGS.schedule} has the "
            "learning rate fall to 0: more cannot follow; choose another --workdir, or --init_from this one"
        )


def _finished(path: Path) -> str | None:
    """Return None if the run can start or be resumed with more epochs; else a note on its result."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    planned, done = result["training"]["epochs"], result["epochs"]
    if planned >= FLAGS.epochs:
        return ""
    return f", and more epochs would change nothing: it stopped after {done}" if done < planned else None


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
    program.start(main)
