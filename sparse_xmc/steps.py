"""One training step of a classifier, as functions of its whole state.

On a CPU, a classifier with a fixed fan-in output layer is trained in place: `xla_ops` updates kernels where
they are, and those of the output and the penultimate layer as it computes their gradients, which are never
held. On a GPU, or with another output layer, Optax trains it. The arithmetic is the same but for bfloat16:
weights are then rounded to nearest, not stochastically, and second moments are in float32.

An embedding of words is trained by Adagrad, row by row: a step takes the rows that its batch uses out of the
table, trains them, and puts them back. Other rows cost nothing, and rare words take larger steps than common
ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import xla_ops
from sparse_xmc.rewire import reset_moments, rewire, rewire_active, rewire_unstructured


def _moment_dtype(config):
    return jnp.dtype("float32" if config.moments == "float32" else "bfloat16")


# ---- the embedding ----


def _init_squares(params: nnx.State) -> jax.Array | None:
    """What Adagrad keeps of an embedding [V, E]: float32 [V], sums over the steps of a row's mean square."""
    return jnp.zeros(params["embedding"]["embedding"].shape[0]) if "embedding" in params else None


def _adagrad(gradient: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The direction of a step of rows with gradient [U, E], and their new `squares` [U].

    Reference: Duchi, Hazan & Singer, JMLR 12, 2011; one sum per row as in Naumov et al., arXiv:1906.00091.
    """
    squares = squares + jnp.square(gradient).mean(axis=1)
    return gradient * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))[:, None], squares


def _on_rows(step):
    """A step which, of an embedding, trains the rows that the batch uses as if they were the whole."""

    @functools.wraps(step)
    def step_on_rows(graphdef, config, seed, state: dict, batch, learning_rate, count):
        if "embedding" not in state["params"]:
            return step(graphdef, config, seed, state, batch, learning_rate, count)
        bags, squares, table = batch.inputs, state["squares"], state["params"]["embedding"]["embedding"][...]
        words, slots = jnp.unique(
            bags.words, return_inverse=True, size=min(bags.words.size, len(table)), fill_value=len(table)
        )

        def put_back(array, rows):
            return array.at[words].set(rows, mode="drop", indices_are_sorted=True)

        batch = dataclasses.replace(batch, inputs=dataclasses.replace(bags, words=slots.astype(jnp.int32)))
        state = state | {
            "params": _with_embedding(state["params"], table.at[words].get(mode="clip")),
            "squares": squares.at[words].get(mode="clip"),
        }
        state, loss = step(graphdef, config, seed, state, batch, learning_rate, count)
        table = put_back(table, state["params"]["embedding"]["embedding"][...])
        return state | {
            "params": _with_embedding(state["params"], table),
            "squares": put_back(squares, state["squares"]),
        }, loss

    return step_on_rows


def _with_embedding(params: nnx.State, embedding: jax.Array) -> nnx.State:
    params = _copy(params)
    _replace(params["embedding"], embedding=embedding)
    return params


def _copy(tree):
    """New containers, which may be changed, of the same arrays."""
    return jax.tree.map(lambda array: array, tree)


def _replace(layer: nnx.State, **arrays: jax.Array) -> None:
    """Puts other arrays into the variables of a layer."""
    for name, array in arrays.items():
        layer[name] = layer[name].replace(array)


def _rewire_output(graphdef, config, state: dict, batch, key: jax.Array, moments=()):
    """Moves connections of the output layer in `state`. Returns what moved, a mask, and the new `moments`."""
    model = nnx.merge(graphdef, state["params"], state["other"], copy=True)
    layer, connectivity = state["params"]["output"], state["other"]["output"]
    kernel, indices = layer["kernel"][...], connectivity["indices"][...]
    sizes = model.output.in_features, model.output.out_features
    if kernel.ndim == 1:
        kernel, indices, moved = rewire_unstructured(key, kernel, indices, *sizes, config.rewire)
    elif config.rewire.growth == "active":
        x = nnx.view(model, deterministic=True).features(batch.inputs)
        kernel, indices, moved, moments = rewire_active(
            kernel, indices, x, batch.positives, config.rewire, moments
        )
    else:
        kernel, indices, moved, moments = rewire(key, kernel, indices, sizes[0], config.rewire, moments)
    _replace(layer, kernel=kernel)
    _replace(connectivity, indices=indices)
    return moved, moments


# ---- by Optax alone ----


def init_optax(config, params: nnx.State, other: nnx.State) -> dict:
    """The state before the first step: parameters, all else of the model, and what optimizers keep."""
    optimizer = _optimizer(config).init(params)
    return {"params": params, "other": other, "optimizer": optimizer, "squares": _init_squares(params)}


@_on_rows
def step_optax(graphdef, config, seed, state: dict, batch, learning_rate, step) -> tuple[dict, jax.Array]:
    """A step of a classifier with any output layer. Returns the new state and the loss."""

    def loss_of(params):
        model = nnx.merge(graphdef, params, state["other"], copy=True)
        loss = model.loss(batch.inputs, batch.positives, config.loss)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    (loss, other), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
    if config.output_optimizer == "sgd":
        scale = config.output_rate * batch.positives.shape[0] * grads["output"]["bias"][...].size
        grads["output"] = jax.tree.map(lambda g: scale * g, grads["output"])
    squares = state["squares"]
    if "embedding" in grads:
        direction, squares = _adagrad(grads["embedding"]["embedding"][...], squares)
        _replace(grads["embedding"], embedding=direction)
    updates, optimizer = _optimizer(config).update(grads, state["optimizer"], state["params"])
    params = jax.tree.map(lambda p, u: p - (learning_rate * u).astype(p.dtype), state["params"], updates)
    return {"params": params, "other": other, "optimizer": optimizer, "squares": squares}, loss


def _optimizer(config) -> optax.GradientTransformation:
    """What turns gradients (of the embedding, Adagrad's direction) into steps, but for the learning rate."""
    adam = functools.partial(optax.scale_by_adam, eps=config.epsilon)
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    rates = {"embedding": config.embedding_rate, "penultimate": config.penultimate_rate}
    if config.output_optimizer == "adam":
        rates["output"] = config.output_rate

    def is_factored(path):
        return config.moments == "factored" and path[:2] == ["penultimate", "kernel"]

    def is_penultimate(path):
        return path[0] == "penultimate" and not is_factored(path)

    def is_output(path):
        return config.output_optimizer == "adam" and path[0] == "output"

    return optax.chain(
        _masked(adam(mu_dtype=_moment_dtype(config)), is_penultimate),
        _masked(adam(), is_output),
        _masked(factored, is_factored),
        *(
            _masked(optax.scale(rate), lambda path, name=name: path[0] == name)
            for name, rate in rates.items()
        ),
    )


def _masked(tx: optax.GradientTransformation, condition) -> optax.GradientTransformation:
    """`tx` for the parameters whose path, a list of names, satisfies a condition."""

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: condition([entry.key for entry in path[:2]]), params
        )

    return optax.masked(tx, mask)


def rewire_optax(graphdef, config, state: dict, batch, key: jax.Array) -> dict:
    """Moves connections of a sparse output layer; the optimizer forgets what it knows of them."""
    moved, _ = _rewire_output(graphdef, config, state, batch, key)

    def is_kernel(path):
        return [entry.key for entry in path[:2]] == ["output", "kernel"]

    optimizer = reset_moments(_optimizer(config), state["optimizer"], state["params"], is_kernel, moved)
    return state | {"optimizer": optimizer}


# ---- in place ----


def init_in_place(config, params: nnx.State, other: nnx.State) -> dict:
    """The state before the first step: parameters, all else of the model, and what optimizers keep."""
    moments = {}
    if "penultimate" in params:
        kernel = params["penultimate"]["kernel"][...]
        if config.moments == "factored":
            moments["penultimate"] = xla_ops.dense_factored_init(kernel)
        else:
            moments["penultimate"] = xla_ops.dense_adam_init(kernel, _moment_dtype(config))
        bias = params["penultimate"]["bias"][...]
        moments["penultimate_bias"] = xla_ops.dense_adam_init(bias[None], _moment_dtype(config))
    if config.output_optimizer == "adam":
        output = params["output"]
        moments["output"] = xla_ops.adam_init(output["kernel"][...], output["bias"][...])
    return {"params": params, "other": other, "moments": moments, "squares": _init_squares(params)}


@_on_rows
def step_in_place(graphdef, config, seed, state: dict, batch, learning_rate, step) -> tuple[dict, jax.Array]:
    """A step of a classifier with a fixed fan-in output layer. Returns the new state and the loss."""
    params, moments, squares = _copy(state["params"]), _copy(state["moments"]), state["squares"]
    embedding = nnx.State({name: layer for name, layer in params.items() if name == "embedding"})

    def embed(embedding):
        model = nnx.merge(graphdef, nnx.merge_state(params, embedding), state["other"], copy=True)
        return model.embed(batch.inputs), nnx.split(model, nnx.Param, ...)[2]

    x, embed_vjp, other = jax.vjp(embed, embedding, has_aux=True)
    if "penultimate" in params:
        kernel, bias = (params["penultimate"][name][...] for name in ("kernel", "bias"))
        y = x @ kernel + bias[None]
        hidden = jnp.maximum(y, 0)
        loss, d_hidden = _step_output(
            config, seed, state, params, moments, hidden, batch, learning_rate, step
        )
        dy = jnp.where(y > 0, d_hidden, 0)
        d_x = dy @ kernel.T if embedding else jnp.zeros(0)
        rate = config.penultimate_rate * learning_rate
        adam_step = functools.partial(xla_ops.dense_adam_step, epsilon=config.epsilon, seed=seed)
        step_kernel = xla_ops.dense_factored_step if config.moments == "factored" else adam_step
        kernel, moments["penultimate"] = step_kernel(x, dy, kernel, moments["penultimate"], rate, before=d_x)
        # A bias is the kernel of an input of ones.
        ones = jnp.ones((len(dy), 1))
        (bias,), moments["penultimate_bias"] = adam_step(
            ones, dy, bias[None], moments["penultimate_bias"], rate
        )
        _replace(params["penultimate"], kernel=kernel, bias=bias)
    else:
        loss, d_x = _step_output(config, seed, state, params, moments, x, batch, learning_rate, step)
    if embedding:
        direction, squares = _adagrad(embed_vjp(d_x)[0]["embedding"]["embedding"][...], squares)
        rows = params["embedding"]["embedding"][...] - config.embedding_rate * learning_rate * direction
        _replace(params["embedding"], embedding=rows)
    return {"params": params, "other": other, "moments": moments, "squares": squares}, loss


def _step_output(config, seed, state, params, moments, x, batch, learning_rate, step):
    """Updates the output layer in `params` and `moments`. Returns the loss and its gradient in x."""
    layer = params["output"]
    kernel, bias = layer["kernel"][...], layer["bias"][...]
    indices = state["other"]["output"]["indices"][...]
    arguments = (x.astype(kernel.dtype), kernel, indices, bias, batch.positives)
    rate = config.output_rate * learning_rate
    if config.output_optimizer == "adam":
        loss, d_x, kernel, bias, moments["output"] = xla_ops.fan_in_adam_step(
            *arguments, moments["output"], rate, loss=config.loss, epsilon=config.epsilon
        )
    else:
        rate = rate * (x.shape[0] * kernel.shape[0])  # the loss is a mean over both
        loss, d_x, kernel, bias = xla_ops.fan_in_sgd_step(
            *arguments, rate, seed=seed, step=step, loss=config.loss
        )
    _replace(layer, kernel=kernel, bias=bias)
    return loss, d_x.astype(x.dtype)


def rewire_in_place(graphdef, config, state: dict, batch, key: jax.Array) -> dict:
    """Moves connections of a fixed fan-in output layer; what Adam remembers of them is forgotten."""
    adam = state["moments"].get("output")
    of_kernel = () if adam is None else (adam.mu_kernel, adam.nu_kernel)
    _, of_kernel = _rewire_output(graphdef, config, state, batch, key, of_kernel)
    if adam is None:
        return state
    mu, nu = of_kernel
    adam = adam._replace(mu_kernel=mu, nu_kernel=nu)
    return state | {"moments": state["moments"] | {"output": adam}}
