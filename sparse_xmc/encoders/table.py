"""Tables of embeddings that are trained by rows: a step costs what its batch uses, not what there is.

While a batch is trained, a table is replaced by the rows that the batch uses, so that no gradient of all of
it exists. They learn by Adagrad with one sum per row: rare words take larger steps than common ones.

Reference: Duchi, Hazan & Singer, JMLR 12, 2011; one sum per row as in Naumov et al., arXiv:1906.00091.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from sparse_xmc.layers import Initializer
from sparse_xmc.modules import path_name


class TableParam(nnx.Param):
    """A table [V, E] of an `EmbeddingTable`."""


class EmbeddingTable(nnx.Module):
    """Embeddings by number, through `lookup`. Wherever one is in an encoder, `Trainer` trains it by rows.

    For that, a training step replaces the table by some of its rows: read it through `lookup` alone, and not
    within a transformation of its own, such as `nnx.remat` or `nnx.scan`.

    Args:
      num_embeddings: V.
      features: E.
      embedding_init: initializer of the table [V, E].
      param_dtype: its dtype.
      rngs: random keys; the stream `params` is used.

    Attributes:
      embedding: `TableParam` [V, E].
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: Initializer = nnx.initializers.normal(0.1),
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embedding = TableParam(embedding_init(rngs.params(), (num_embeddings, features), param_dtype))
        # Where in the table an id is, while a step has replaced the table by some of its rows.
        self.locate: Callable[[Array], Array] | None = None

    def lookup(self, ids: ArrayLike) -> Array:
        """The rows [..., E] of ids [...] in 0..V-1; NaN for any other, negative ones too."""
        at = jnp.asarray(ids)
        at = at if self.locate is None else self.locate(at)
        at = jnp.where(at < 0, self.embedding.shape[0], at)
        return self.embedding[...].at[at].get(mode="fill", fill_value=jnp.nan)


def tables_of(encoder: nnx.Module) -> Iterator[tuple[str, EmbeddingTable]]:
    """Yields every table of an encoder with the path of its parameter."""
    for path, module in nnx.iter_modules(encoder):
        if isinstance(module, EmbeddingTable):
            yield path_name((*path, "embedding")), module


def used_rows(encoder: nnx.Module, inputs: Any) -> dict[str, Array]:
    """The rows that an encoder uses for a batch: by table, ids int32 [U], ascending, then V as padding.

    Runs the encoder, in which `locate` is left changed; of what it computes nothing is kept but the ids, so
    that under `jit` XLA removes the rest.

    Raises:
      ValueError: a table is not used, and so nothing would train it.
    """
    seen: dict[str, list[Array]] = {path: [] for path, _ in tables_of(encoder)}
    if not seen:
        return {}

    def recorder(ids_of_table):
        def record(ids):
            ids_of_table.append(jnp.ravel(ids))
            return ids

        return record

    sizes = {}
    for path, table in tables_of(encoder):
        table.locate = recorder(seen[path])
        sizes[path] = table.embedding.shape[0]
    encoder(inputs)
    rows = {}
    for path, calls in seen.items():
        if not calls:
            raise ValueError(f"the encoder does not use its table {path}, so that nothing would train it")
        ids, size = jnp.concatenate(calls), sizes[path]
        ids = jnp.where((ids >= 0) & (ids < size), ids, size)  # others are padding
        rows[path] = jnp.unique(ids, size=min(ids.size, size), fill_value=size).astype(jnp.int32)
    return rows


def take_rows(encoder: nnx.Module, rows: dict[str, Array]) -> None:
    """Replaces the tables of an encoder by the given rows of them."""
    for path, table in tables_of(encoder):
        of_table, size = rows[path], table.embedding.shape[0]
        table.embedding.set_value(table.embedding[...].at[of_table].get(mode="clip"))
        table.locate = functools.partial(_place, of_table, size)


def _place(rows: Array, size: int, ids: Array) -> Array:
    """Where ids in 0..size-1 are among `rows`; others are beyond the last."""
    return jnp.where((ids >= 0) & (ids < size), jnp.searchsorted(rows, ids), len(rows))


def put_rows(table: Array, rows: Array, values: Array) -> Array:
    """A table with other values in the given rows; padding is dropped."""
    return table.at[rows].set(values, mode="drop", indices_are_sorted=True)


def adagrad(gradient: Array, squares: Array) -> tuple[Array, Array]:
    """The direction of a step of rows with gradient [U, E], and their new `squares` [U].

    `squares` are the sums over the steps of a row's mean square of the gradient.
    """
    squares = squares + jnp.square(gradient).mean(axis=1)
    return gradient * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))[:, None], squares
