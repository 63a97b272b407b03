"""Flags of `sparse-xmc run`, and the configurations that they describe.

Flags of configurations are made from their dataclasses (`reflection`). This module is imported by all
programs that describe classifiers by the same flags.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from sparse_xmc.cli import flagfiles, reflection
from sparse_xmc.heads import HEADS, HeadConfig
from sparse_xmc.metrics import PROPENSITY_CONSTANTS
from sparse_xmc.model import ClassifierConfig, EncoderConfig
from sparse_xmc.train import TrainingConfig

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


flags.DEFINE_string("workdir", None, "Directory to write results and checkpoints to.")
flags.DEFINE_bool("plan", False, "Print the planned memory of training without training.")
flags.DEFINE_integer("seed", 0, "Seed of all random numbers.")
flags.DEFINE_string("name", "", "Name of the run in tables; by default, the name of the working directory.")

flags.DEFINE_string(
    "init_from",
    None,
    "Directory of a saved model, such as that of another run, that provides the initial weights.",
)

flags.DEFINE_string(
    "train",
    None,
    "File of training points: .tsv (labels<TAB>text), or .txt in the format of the Extreme Classification "
    "Repository.",
)
flags.DEFINE_string("test", None, "File of test points, in the same format.")
flags.DEFINE_string(
    "train_features", None, "File of dense features of the training points, .npy float32 [N, D]."
)
flags.DEFINE_string("test_features", None, "File of dense features of the test points, in the same format.")
flags.DEFINE_string(
    "train_filter",
    None,
    "File of labels to exclude from the ranking of training points in evaluation; one 'point label' pair "
    "per line.",
)
flags.DEFINE_string(
    "test_filter", None, "File of labels to exclude from the ranking of test points, in the same format."
)
flags.DEFINE_string(
    "cache_dir",
    None,
    "Directory to cache parsed .txt files and embeddings of texts in; by default, no cache.",
)
flags.DEFINE_integer(
    "ngrams", 1, "Features of raw text: 1 for words, 2 for words and pairs of neighbouring words.", 1
)
flags.DEFINE_string(
    "encoder",
    None,
    "Directory of a pretrained encoder in the format of Hugging Face, for raw text in addition to the words.",
)
flags.DEFINE_bool(
    "encoder_trainable",
    False,
    "Fine-tune --encoder instead of computing its embeddings once; see text_encoder.cfg.",
)
flags.DEFINE_enum(
    "encoder_dtype", "float32", ["float32", "bfloat16"], "Dtype in which a fine-tuned encoder computes."
)
flags.DEFINE_bool(
    "encoder_remat",
    False,
    "Recompute the layers of a fine-tuned encoder in the backward pass, to save memory.",
)
flags.DEFINE_integer(
    "max_length", 64, "Maximum number of tokens per text that --encoder reads; longer texts are truncated.", 3
)
flags.DEFINE_enum(
    "propensities",
    "default",
    list(PROPENSITY_CONSTANTS),
    "Family of data sets whose constants propensity-scored metrics use.",
)
flags.DEFINE_float(
    "validation_fraction", 0.02, "Fraction of the training points held out for validation.", 0, 1
)
flags.DEFINE_bool(
    "validate_on_test",
    False,
    "Validate on the test set instead of held-out training points, as the paper does.",
)
flags.DEFINE_float("checkpoint_minutes", 10, "Time between checkpoints, in minutes.", 0)

flags.DEFINE_string(
    "mesh",
    None,
    'Mesh of devices for the batch and the labels, such as "data:2,label:4"; by default, one device.',
)
flags.DEFINE_string(
    "coordinator", None, 'Address:port of process 0, for several processes; "auto" if JAX can detect it.'
)
flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator=ADDRESS:PORT.", 1)
flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0, with --coordinator=ADDRESS:PORT.", 0
)

reflection.define_flags(EncoderConfig)
reflection.define_kinds("head", HEADS, "fixed_fan_in", "Kind of the head: the layers after the encoder.")
reflection.define_flags(TrainingConfig)
flags.adopt_module_key_flags(reflection)


def own_flags() -> list[flags.Flag]:
    """Return the flags of `sparse-xmc run`, without those of the program that imports this module."""
    modules = FLAGS.flags_by_module_dict()
    return [*modules[__name__], *modules[reflection.__name__]]


def current_values() -> dict[str, Any]:
    """Return the values of all flags of `sparse-xmc run`, given on the command line or not."""
    return {flag.name: flag.value for flag in own_flags()}


def values_of(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of the flags of `sparse-xmc run` for given arguments, without the command line."""
    values = flags.FlagValues()
    for flag in own_flags():
        values[flag.name] = copied = copy.deepcopy(flag)
        copied.unparse()
        copied.validators.clear()  # `run` requires some flags; `arguments` may lack them.
    values(["sparse-xmc run", *flagfiles.expand(arguments)])
    return values.flag_values_dict()


def effective_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all flags that affect results; they identify a run.

    Args:
      values: values of flags by name. Missing flags have their defaults, so that a flag may be newer than the
        run, and missing fields of the head the defaults of its class.
    """
    values = {flag.name: flag.default for flag in own_flags()} | dict(values)
    head = reflection.fields_of_kind("head", HEADS, values)
    values |= {name: head.get(name) for name in reflection.field_names(HEADS)}
    return {name: value for name, value in values.items() if name not in INCIDENTAL_FLAGS}


def flag_lines() -> list[str]:
    """Return the lines of a flagfile that repeats the run of the command line."""
    return [flag.serialize() for flag in own_flags() if flag.value is not None]


def unused_flags(*used: str) -> list[str]:
    """Return the names of given flags of `sparse-xmc run` that are not among the used ones."""
    return [flag.name for flag in own_flags() if flag.present and flag.name not in used]


class Settings(NamedTuple):
    """The configurations that the flags describe, without data."""

    encoder: EncoderConfig
    head: HeadConfig
    training: TrainingConfig

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """Make the configurations from values of flags."""
        return cls(
            reflection.read_flags(EncoderConfig, values),
            reflection.read_kind("head", HEADS, values),
            reflection.read_flags(TrainingConfig, values),
        )

    def classifier(
        self, num_features: int, num_labels: int, *, bag_of_words: bool = False
    ) -> ClassifierConfig:
        """Return the configuration of a classifier for a data set of these sizes."""
        return ClassifierConfig(
            num_features, num_labels, bag_of_words=bag_of_words, encoder=self.encoder, head=self.head
        )
