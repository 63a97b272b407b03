"""Reading and writing of the files of BERT encoders in the formats of Hugging Face's libraries.

No code from a directory is executed: configurations are JSON, tensors are safetensors.
"""

import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_xmc.data.files import new_path, write_text
from sparse_xmc.settings import check, setting

POOLINGS = ("mean", "cls", "pooler")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# ---- config.json ----

# Optional prefix of the tensor names.
_PREFIXES = {"bert": "bert.", "distilbert": "distilbert.", "roberta": "roberta.", "xlm-roberta": "roberta."}
_DISTILBERT_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
}


def _size(default: Any = dataclasses.MISSING, *, at_least: int = 1, at_most: int = 1 << 24) -> Any:
    """Declare an integer field; the bounds are far above the sizes of all published models."""
    return setting(default, at_least=at_least, at_most=at_most)


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """The architecture of an encoder, with the keys of `config.json` of BERT and RoBERTa.

    Raises:
      ValueError: the architecture or the activation is not supported, or sizes are out of range or
        inconsistent.
    """

    model_type: str
    vocab_size: int = _size()
    hidden_size: int = _size()
    num_hidden_layers: int = _size(at_most=1000)
    num_attention_heads: int = _size()
    intermediate_size: int = _size()
    max_position_embeddings: int = _size()
    type_vocab_size: int = _size(2, at_least=0)  # 0 for DistilBERT, which has no token types
    pad_token_id: int = _size(0, at_least=0)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = setting(0.1, at_least=0, below=1)
    layer_norm_eps: float = setting(1e-12, above=0)

    def __post_init__(self):
        check(self)
        require_one_of("model_type", self.model_type, _PREFIXES)
        require_one_of("activation", self.hidden_act, ACTIVATIONS)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads do not divide the hidden size {self.hidden_size}"
            )
        if self.max_length < 1:
            raise ValueError(f"{self.max_position_embeddings} positions leave none for a token")

    @property
    def first_position(self) -> int:
        """Row of the position embeddings of the first token: 0, but after the padding row for RoBERTa."""
        return self.pad_token_id + 1 if "roberta" in self.model_type else 0

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a text."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "PretrainedConfig":
        """Read a `config.json`.

        Raises:
          ValueError: the file is missing, or the architecture is not supported; the message names the file.
        """
        values = _read_json(Path(path))
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a configuration")
        try:
            model_type = str(values.get("model_type"))
            require_one_of("model_type", model_type, _PREFIXES)
            for key, expected in (("position_embedding_type", "absolute"), ("is_decoder", False)):
                if values.get(key, expected) != expected:
                    raise ValueError(f"{key} must be {expected}, got {values[key]!r}")
            settings: dict[str, Any] = {"pad_token_id": 1} if "roberta" in model_type else {}
            keys = _DISTILBERT_KEYS if model_type == "distilbert" else {}
            for field in dataclasses.fields(cls):
                key = keys.get(field.name, field.name)
                if values.get(key) is not None:
                    settings[field.name] = values[key]
                elif field.default is dataclasses.MISSING:
                    raise ValueError(f"{key} is missing")
            if model_type == "distilbert":
                settings |= {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
            return cls(**settings)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write a `config.json` that `from_file` and the transformers library read."""
        values = dataclasses.asdict(self)
        if self.model_type == "distilbert":
            del values["type_vocab_size"], values["layer_norm_eps"]
            values = {_DISTILBERT_KEYS.get(key, key): value for key, value in values.items()}
        _write_json(Path(path), values)


# ---- model.safetensors ----

_MODULES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_BERT_LAYER = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "norm": ("output.LayerNorm",),
}
_DISTILBERT_LAYER = {
    "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention_out": ("attention.out_lin",),
    "attention_norm": ("sa_layer_norm",),
    "up": ("ffn.lin1",),
    "down": ("ffn.lin2",),
    "norm": ("output_layer_norm",),
}
_DTYPES = ("F32", "F16", "BF16")
# Tensors that are ignored: buffers, an unused pooler, and the heads of other tasks.
_IGNORED = re.compile(
    r"embeddings\.(position_ids|token_type_ids)|pooler\..*|cls\..*|lm_head\..*|vocab_(transform|layer_norm|projector)\..*"
    r"|(pre_)?classifier\..*|qa_outputs\..*"
)


def tensor_names(path: str, config: PretrainedConfig) -> list[str]:
    """Return the names of the tensors that, concatenated along the last axis, form a parameter.

    Kernels are stored transposed.
    """
    module, field = path.rsplit(".", 1)
    field = "bias" if field == "bias" else "weight"
    if module in _MODULES:
        return [f"{_MODULES[module]}.{field}"]
    _, layer, module = module.split(".")
    if config.model_type == "distilbert":
        return [f"transformer.layer.{layer}.{name}.{field}" for name in _DISTILBERT_LAYER[module]]
    return [f"encoder.layer.{layer}.{name}.{field}" for name in _BERT_LAYER[module]]


def read_parameters(
    directory: Path, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Read the parameters of an encoder, in float32.

    Args:
      directory: the directory.
      config: the architecture.
      shapes: the shape of each parameter, by its path.

    Returns:
      The parameters by their paths.

    Raises:
      ValueError: tensors are missing, unknown, of wrong shape, or not of finite floats, or a file is damaged;
        the message names them.
    """
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(directory, _PREFIXES[config.model_type], stack)
        names = {path: tensor_names(path, config) for path in shapes}
        expected_names = {name for parameter_names in names.values() for name in parameter_names}
        problems = [f"{name} is missing" for name in sorted(expected_names - {*tensors})]
        problems += [
            f"{name} is not of a {config.model_type}"
            for name in sorted({*tensors} - expected_names)
            if not _IGNORED.fullmatch(name)
        ]
        for path, shape in shapes.items():
            expected = (*shape[:-1], shape[-1] // len(names[path]))
            expected = expected[::-1] if path.endswith(".kernel") else expected
            for name in names[path]:
                if name not in tensors:
                    continue
                if (found := tensors[name].shape) != expected:
                    problems.append(f"{name} has shape {list(found)}, not {list(expected)}")
                if (dtype := tensors[name].dtype) not in _DTYPES:
                    problems.append(f"{name} is {dtype}, not one of {', '.join(_DTYPES)}")
        if problems:
            raise ValueError(f"{directory}: {_join(problems)}")
        values = {}
        for path in shapes:
            parts = [tensors[name].read() for name in names[path]]
            for name, part in zip(names[path], parts, strict=True):
                if not np.isfinite(part).all():
                    raise ValueError(f"{directory}: {name} has inf or nan")
            parts = [part.T for part in parts] if path.endswith(".kernel") else parts
            values[path] = np.concatenate(parts, axis=-1).astype(np.float32, copy=False)
        return values


@dataclasses.dataclass
class _Tensor:
    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


def _open_tensors(directory: Path, prefix: str, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Open the tensors of all files, by their names without the prefix."""
    safetensors = _safetensors()
    tensors = {}
    for file in weight_files(directory):
        try:
            opened = stack.enter_context(safetensors.safe_open(file, framework="np"))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from error
        for name in opened.keys():  # noqa: SIM118
            # The first BERT checkpoints have the names of TensorFlow.
            current = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
                "LayerNorm.beta", "LayerNorm.bias"
            )
            tensors[current.removeprefix(prefix)] = _Tensor(opened, name)
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """Return the paths of `model.safetensors`, or of the shards listed in its index.

    Raises:
      ValueError: neither file exists, or the index does not list files in the directory.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ValueError(f"{whole}: no such file, nor an index of shards; pickled weights are not read")
    try:
        names = sorted(set(_read_json(index)["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"expected names of files, got {names}")
        missing = [name for name in names if not (directory / name).is_file()]
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise ValueError(f"{index}: not an index of shards: {error}") from error
    if missing:
        raise ValueError(f"{index}: {_join(missing)} missing")
    return [directory / name for name in names]


def write_parameters(directory: Path, config: PretrainedConfig, parameters: Mapping[str, np.ndarray]) -> None:
    """Write `model.safetensors`, for `read_parameters` and the transformers library."""
    tensors = {}
    for path, value in parameters.items():
        names = tensor_names(path, config)
        for name, part in zip(names, np.split(value, len(names), axis=-1), strict=True):
            tensors[name] = np.ascontiguousarray(part.T if path.endswith(".kernel") else part)
    with new_path(directory / "model.safetensors") as file:
        _safetensors().numpy.save_file(tensors, file, metadata={"format": "pt"})


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "safetensors is not installed, which pretrained encoders need: pip install 'sparse-xmc[text]'"
        ) from error
    return safetensors


# ---- modules.json and 1_Pooling/config.json, of the sentence-transformers library ----

_POOLING_KEYS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


def resolve_pooling(directory: Path, pooling: str | None, normalize: bool | None) -> tuple[str, bool]:
    """Determine the pooling and the normalisation.

    Args:
      directory: directory of the encoder.
      pooling: the pooling; None for the setting in the directory, or "mean" without one.
      normalize: whether to normalise; None for the setting in the directory, or False without one.

    Returns:
      The pooling, and whether to normalise.

    Raises:
      ValueError: a file is malformed, or `pooling` is None and the setting in the directory is not supported.
    """
    modules = _read_json(directory / "modules.json", default=[{"type": "Pooling", "path": "1_Pooling"}])
    try:
        kinds = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory / 'modules.json'}: not a list of modules: {error!r}") from error
    if normalize is None:
        normalize = "Normalize" in kinds
    if pooling is not None:
        return pooling, normalize
    if unknown := sorted({*kinds} - {"Transformer", "Pooling", "Normalize"}):
        file = directory / "modules.json"
        raise ValueError(f"{file}: {_join(unknown)} not supported; pass `pooling` to ignore them")
    file = directory / kinds.get("Pooling", "1_Pooling") / "config.json"
    values = _read_json(file, default={_POOLING_KEYS["mean"]: True})
    modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    modes = [{key: name for name, key in _POOLING_KEYS.items()}.get(key, key) for key in modes]
    if "pooling_mode" in values:
        modes = [values["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{file}: pooling must be one of {', '.join(POOLINGS)}, got {modes}")
    return modes[0], normalize


def write_pooling(directory: Path, pooling: str, normalize: bool, features: int) -> None:
    """Write the pooling settings, for `resolve_pooling` and sentence-transformers.

    The latter has no "pooler".
    """
    kinds = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if normalize else {})
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    _write_json(directory / "modules.json", modules)
    values: dict[str, Any] = {"word_embedding_dimension": features}
    values |= {key: pooling == name for name, key in _POOLING_KEYS.items()}
    values |= {} if pooling in _POOLING_KEYS else {"pooling_mode": pooling}
    (directory / "1_Pooling").mkdir(exist_ok=True)
    _write_json(directory / "1_Pooling" / "config.json", values)


# ---- sentence_bert_config.json and config_sentence_transformers.json, of the same library ----


def resolve_length(directory: Path, max_length: int | None, config: PretrainedConfig) -> int | None:
    """Determine the maximum number of tokens of a text.

    Args:
      directory: directory of the encoder; its sentence_bert_config.json may set `max_seq_length`.
      max_length: the maximum chosen by the caller; None for the setting in the directory.
      config: the architecture, which limits the maximum.

    Returns:
      The maximum, or None if neither the caller nor the directory sets one.

    Raises:
      ValueError: `max_length` is larger than the architecture supports, or the file is malformed.
    """
    if max_length is None:
        length = _max_seq_length(directory)
        return None if length is None else min(length, config.max_length)
    if max_length > config.max_length:
        raise ValueError(f"max_length must be at most {config.max_length} for {directory}, got {max_length}")
    return max_length


def _max_seq_length(directory: Path) -> int | None:
    file = directory / "sentence_bert_config.json"
    length = _read_json(file, default={}).get("max_seq_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ValueError(f"{file}: max_seq_length must be a whole number above 0, got {length!r}")
    return length


def warn_of_unused_settings(directory: Path, max_length: int | None) -> None:
    """Warn of settings of sentence-transformers that are ignored: prompts, and an exceeded maximum length.

    Args:
      directory: directory of the encoder.
      max_length: maximum number of tokens chosen by the caller; None for the encoder's own.
    """
    limit = _max_seq_length(directory)
    if limit is not None and max_length is not None and max_length > limit:
        warnings.warn(
            f"max_length={max_length} is above the max_seq_length of the encoder in {directory}, {limit}",
            stacklevel=3,
        )
    file = directory / "config_sentence_transformers.json"
    prompts = _read_json(file, default={}).get("prompts")
    if isinstance(prompts, dict) and (names := [name for name, prompt in prompts.items() if prompt]):
        warnings.warn(
            f"{file}: the prompts {', '.join(map(str, names))} are not applied; put the one that "
            "the encoder needs in front of each text",
            stacklevel=3,
        )


# ---- shared helpers ----


def require_one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is among `choices`."""
    if value not in (choices := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _join(problems: list[str]) -> str:
    """Join the first few problems into one line, even if names in them contain line breaks."""
    shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
    return " ".join("; ".join(shown).split())


def _read_json(path: Path, default: Any = None) -> Any:
    """Read a JSON file; return `default`, if it is not None, if the file is missing."""
    try:
        if default is not None and not path.is_file():
            return default
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
    if default is not None and type(values) is not type(default):
        raise ValueError(f"{path}: expected a {type(default).__name__}, got a {type(values).__name__}")
    return values


def _write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
