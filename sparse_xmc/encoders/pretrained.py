"""Pretrained text encoders of the BERT family, read from directories in the format of Hugging Face.

References: BERT, Devlin et al., NAACL 2019; RoBERTa, Liu et al., arXiv:1907.11692; DistilBERT, Sanh et al.,
arXiv:1910.01108; XLM-RoBERTa, Conneau et al., ACL 2020; pooling and normalisation as in Sentence-BERT,
Reimers & Gurevych, EMNLP 2019.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sparse_xmc.data.tokens import Tokens
from sparse_xmc.encoders import pretrained_files as files
from sparse_xmc.encoders.pretrained_files import PretrainedConfig
from sparse_xmc.modules import parameters_of

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "gelu_new": functools.partial(nnx.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
}
_INIT = nnx.initializers.normal(0.02)


class _LayerNorm(nnx.LayerNorm):
    """A layer normalisation that computes in float32 and returns `dtype`."""

    def __init__(self, config: PretrainedConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.output_dtype = dtype

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        return super().__call__(x.astype(jnp.float32)).astype(self.output_dtype)


class _Layer(nnx.Module):
    """A transformer layer: self-attention and feed-forward network, each with residual and normalisation."""

    def __init__(self, config: PretrainedConfig, dropout: float, dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(nnx.Linear, dtype=dtype, kernel_init=_INIT, rngs=rngs)
        self.num_heads = config.num_attention_heads
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.qkv = linear(width, 3 * width)  # queries, keys and values in one product
        self.attention_out = linear(width, width)
        self.attention_norm = _LayerNorm(config, dtype, rngs)
        self.up = linear(width, inner)
        self.down = linear(inner, width)
        self.norm = _LayerNorm(config, dtype, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: Array, lengths: Array) -> Array:
        """Map [B, T, E] to [B, T, E]; attends only to the first `lengths` [B] tokens of each text."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        attended = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
        x = self.attention_norm(x + self.dropout(self.attention_out(attended.reshape(x.shape))))
        return self.norm(x + self.dropout(self.down(self.activation(self.up(x)))))


class PretrainedEncoder(nnx.Module):
    """An encoder of the BERT family, which maps tokens to features of each text.

    The constructor initializes the parameters at random; `from_directory` reads a pretrained encoder.

    Args:
      config: the architecture.
      pooling: how the features of a text are computed: "mean" for the mean of the outputs of its tokens,
        "cls" for the output of its first token, "pooler" for the latter passed through the model's own layer
        with tanh, which not all models have.
      normalize: whether features are scaled to unit length.
      dtype: dtype of the computation, float32 or bfloat16; parameters and features are float32.
      dropout: dropout rate, applied as in BERT, except on attention weights; None for the rate of `config`.
      remat: whether a backward pass recomputes the activations within each layer, which takes less memory.
      rngs: random keys; the streams `params` and `dropout` are used.

    Attributes:
      features: E, the number of features.

    Raises:
      ValueError: the pooling is unknown, or the architecture does not support it.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        dtype: DTypeLike = jnp.float32,
        dropout: float | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        files.require_one_of("pooling", pooling, files.POOLINGS)
        if pooling == "pooler" and config.model_type == "distilbert":
            raise ValueError("pooling must be mean or cls: a distilbert has no pooler")
        self.config, self.pooling, self.normalize, self.remat = config, pooling, normalize, remat
        self.features, self.dtype = config.hidden_size, dtype
        rate = config.hidden_dropout_prob if dropout is None else dropout
        embed = functools.partial(nnx.Embed, features=self.features, embedding_init=_INIT, rngs=rngs)
        self.words = embed(config.vocab_size)
        self.positions = embed(config.max_position_embeddings)
        if config.type_vocab_size:
            self.types = embed(config.type_vocab_size)
        self.norm = _LayerNorm(config, dtype, rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.layers = nnx.List([_Layer(config, rate, dtype, rngs) for _ in range(config.num_hidden_layers)])
        if pooling == "pooler":
            self.pooler = nnx.Linear(self.features, self.features, dtype=dtype, kernel_init=_INIT, rngs=rngs)

    def __call__(self, tokens: Tokens) -> Array:
        """Map a batch of B texts to float32 [B, E]; NaN for texts with a token outside of the vocabulary.

        Raises:
          ValueError: the batch is wider than the maximum length of texts.
        """
        ids, lengths = jnp.asarray(tokens.ids), jnp.asarray(tokens.lengths)
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.config.max_length:
            raise ValueError(
                f"ids must have shape [B, 1..{self.config.max_length}], got {list(ids.shape)}; "
                "give the tokenizer a max_length"
            )
        first = self.config.first_position
        context = self.positions.embedding[first : first + ids.shape[1]]
        if self.config.type_vocab_size:  # All tokens have the type of a first sentence.
            context = context + self.types.embedding[:1]
        x = self.dropout(self.norm(self.words(ids) + context[None]))
        for layer in self.layers:
            x = nnx.remat(_Layer.__call__)(layer, x, lengths) if self.remat else layer(x, lengths)
        x = self._pool(x, lengths)
        if self.normalize:
            x = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return x

    def _pool(self, x: Array, lengths: Array) -> Array:
        if self.pooling == "pooler":
            return jnp.tanh(self.pooler(x[:, 0])).astype(jnp.float32)
        x = x.astype(jnp.float32)
        if self.pooling == "cls":
            return x[:, 0]
        used = jnp.arange(x.shape[1], dtype=lengths.dtype)[None] < lengths[:, None]
        total = jnp.sum(x, axis=1, where=used[:, :, None])
        return total / jnp.maximum(lengths, 1)[:, None].astype(jnp.float32)

    @classmethod
    def from_directory(
        cls,
        path: str | os.PathLike,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        dtype: DTypeLike = jnp.float32,
        dropout: float | None = None,
        remat: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> "PretrainedEncoder":
        """Read an encoder from the `config.json` and `model.safetensors` of a directory, possibly in shards.

        Further arguments are as for the class.

        Args:
          path: the directory.
          pooling: as for the class; None for the pooling that the sentence-transformers library would use
            according to the files of the directory, or "mean" without such files.
          normalize: as for the class; None likewise, or False without such files.
          rngs: random keys for dropout; None for `nnx.Rngs(0)`.

        Raises:
          ImportError: the safetensors library is not installed.
          ValueError: a file or tensor is missing, a tensor is unknown or has a wrong shape, or the
            architecture is not supported. The message names them.
        """
        path = Path(path)
        config = PretrainedConfig.from_file(path / "config.json")
        pooling, normalize = files.resolve_pooling(path, pooling, normalize)
        options: dict[str, Any] = {
            "pooling": pooling,
            "normalize": normalize,
            "dtype": dtype,
            "dropout": dropout,
            "remat": remat,
        }
        rngs = nnx.Rngs(0) if rngs is None else rngs
        # No random parameters are computed: all are read from files. The dropout streams are replaced below.
        encoder = nnx.eval_shape(lambda: cls(config, **options, rngs=nnx.Rngs(0)))
        parameters = parameters_of(encoder)
        values = files.read_parameters(path, config, {name: p.shape for name, p in parameters.items()})
        for name, parameter in parameters.items():
            parameter.set_value(jnp.asarray(values.pop(name)))
        for _, module in nnx.iter_modules(encoder):
            if isinstance(module, nnx.Dropout):
                module.rngs = rngs.dropout.fork()
        return encoder

    def save(self, directory: str | os.PathLike) -> None:
        """Write `config.json`, `model.safetensors` and the pooling settings, for `from_directory`.

        The transformers library can read these files, and so can sentence-transformers unless the pooling is
        "pooler".
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        values = {name: np.asarray(parameter[...]) for name, parameter in parameters_of(self).items()}
        files.write_parameters(directory, self.config, values)
        self.config.save(directory / "config.json")
        files.write_pooling(directory, self.pooling, self.normalize, self.features)
