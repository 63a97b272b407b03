"""Embedding tables trained by rows, so that the cost of a step depends on the batch, not on the table.

In a training step, a table is replaced by the rows that the batch uses, so that no gradient of the whole
table exists. Adagrad trains the rows, with one sum of squares per row: rare words take larger steps than
common ones.

Reference: Duchi, Hazan & Singer, JMLR 12, 2011; one sum per row as in Naumov et al., arXiv:1906.00091.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from sparse_xmc.layers import Initializer
from sparse_xmc.modules import path_name


class TableParam(nnx.Param):
    """The parameter [V, E] of an `EmbeddingTable`."""


class EmbeddingTable(nnx.Module):
    """A table of embeddings, read by `lookup`. `Trainer` trains it by rows anywhere in an encoder.

    A training step replaces the table by some of its rows. Therefore read it by `lookup` only, and not within
    a transformation of its own, such as `nnx.remat` or `nnx.scan`.

    Args:
      num_embeddings: V, the number of embeddings.
      features: E, the size of an embedding.
      embedding_init: initializer of the table [V, E].
      param_dtype: dtype of the table.
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
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embedding = TableParam(embedding_init(rngs.params(), (num_embeddings, features), param_dtype))
        # Maps ids to rows of the table while a training step has replaced the table by some of its rows.
        self.locate: Callable[[Array], Array] | None = None

    def lookup(self, ids: ArrayLike) -> Array:
        """Return the rows [..., E] for ids [...] in 0..V-1; NaN for other ids, including negative ones."""
        at = jnp.asarray(ids)
        at = at if self.locate is None else self.locate(at)
        at = jnp.where(at < 0, self.embedding.shape[0], at)
        return self.embedding[...].at[at].get(mode="fill", fill_value=jnp.nan)


def tables_of(encoder: nnx.Module) -> Iterator[tuple[str, EmbeddingTable]]:
    """Yield every table of an encoder with the path of its parameter."""
    for path, module in nnx.iter_modules(encoder):
        if isinstance(module, EmbeddingTable):
            yield path_name((*path, "embedding")), module


def used_rows(encoder: nnx.Module, inputs: Any) -> dict[str, Array]:
    """Find the table rows that an encoder uses for a batch.

    Runs the encoder, and leaves the `locate` attributes of its tables changed. Only the ids are kept, so that
    under `jit` XLA removes all other computations.

    Args:
      encoder: the encoder.
      inputs: the inputs of the batch.

    Returns:
      A dictionary from the path of a table to ids int32 [U], ascending, padded with V.

    Raises:
      ValueError: the encoder does not use a table, which would therefore stay untrained.
    """
    seen: dict[str, list[Array]] = {path: [] for path, _ in tables_of(encoder)}
    if not seen:
        return {}

    def recorder(ids_of_table: list[Array]) -> Callable[[Array], Array]:
        def record(ids: Array) -> Array:
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
        ids = jnp.where((ids >= 0) & (ids < size), ids, size)  # Ids out of range become padding.
        rows[path] = jnp.unique(ids, size=min(ids.size, size), fill_value=size).astype(jnp.int32)
    return rows


def take_rows(encoder: nnx.Module, rows: dict[str, Array]) -> None:
    """Replace the tables of an encoder by the given rows of the tables."""
    for path, table in tables_of(encoder):
        of_table, size = rows[path], table.embedding.shape[0]
        table.embedding.set_value(table.embedding[...].at[of_table].get(mode="clip"))
        table.locate = functools.partial(_place, of_table, size)


def _place(rows: Array, size: int, ids: Array) -> Array:
    """Return the positions of ids within `rows`; `len(rows)` for ids outside of 0..size-1."""
    return jnp.where((ids >= 0) & (ids < size), jnp.searchsorted(rows, ids), len(rows))


def put_rows(table: Array, rows: Array, values: Array) -> Array:
    """Return a table with new values in the given rows; padding is ignored."""
    return table.at[rows].set(values, mode="drop", indices_are_sorted=True)


def adagrad(gradient: Array, squares: Array) -> tuple[Array, Array]:
    """Compute an Adagrad update of rows.

    Args:
      gradient: float32 [U, E].
      squares: float32 [U], for each row the sum over the steps of the mean square of its gradient.

    Returns:
      The direction of the step [U, E], and the new `squares` [U].
    """
    squares = squares + jnp.square(gradient).mean(axis=1)
    return gradient * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))[:, None], squares
