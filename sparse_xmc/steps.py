"""One training step of a classifier, as functions of its whole state.

On a CPU, a classifier with a fixed fan-in output layer is trained in place: `xla_ops` updates that layer, and
the kernel of the penultimate layer, as it computes their gradients, which are therefore never held. Optax
trains what remains (biases, embedding), and all of a classifier on a GPU or with another output layer. Either
way the arithmetic is Optax's.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import xla_ops
from sparse_xmc.rewire import reset_moments, rewire, rewire_unstructured

# ---- by Optax alone ----


def init_optax(config, params: nnx.State, other: nnx.State) -> dict:
    """The state before the first step: parameters, all else of the model, and the optimizer's."""
    return {"params": params, "other": other, "optimizer": _optimizer(config).init(params)}


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
    params, optimizer = _apply(config, grads, state["optimizer"], state["params"], learning_rate)
    return {"params": params, "other": other, "optimizer": optimizer}, loss


def _optimizer(config) -> optax.GradientTransformation:
    """What turns gradients into steps, but for the learning rate."""
    mu_dtype = jnp.dtype("float32" if config.moments == "float32" else "bfloat16")
    adam = optax.scale_by_adam(eps=config.epsilon, mu_dtype=mu_dtype)
    rates = {"embedding": config.embedding_rate, "penultimate": config.penultimate_rate}
    without_adam = []
    if config.moments == "factored":
        without_adam.append("penultimate")
    if config.output_optimizer == "sgd":
        without_adam.append("output")
    else:
        rates["output"] = config.output_rate
    transforms = [_masked(adam, lambda layer: layer not in without_adam)]
    if config.moments == "factored":
        transforms.append(_masked(optax.scale_by_factored_rms(), "penultimate".__eq__))
    transforms += [_masked(optax.scale(rate), layer.__eq__) for layer, rate in rates.items()]
    return optax.chain(*transforms)


def _masked(tx: optax.GradientTransformation, is_layer) -> optax.GradientTransformation:
    """`tx` for the parameters of the layers whose name `is_layer` accepts."""

    def mask(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: is_layer(path[0].key), params)

    return optax.masked(tx, mask)


def _apply(config, grads, optimizer, params, learning_rate):
    updates, optimizer = _optimizer(config).update(grads, optimizer, params)
    return jax.tree.map(lambda p, u: p - (learning_rate * u).astype(p.dtype), params, updates), optimizer


def rewire_optax(config, in_features: int, labels: int, state: dict, key: jax.Array) -> dict:
    """Moves connections of a sparse output layer; the optimizer forgets what it knows of them."""
    output, connectivity = state["params"]["output"], state["other"]["output"]
    kernel, indices = output["kernel"][...], connectivity["indices"][...]
    if kernel.ndim == 1:
        kernel, indices, moved = rewire_unstructured(key, kernel, indices, in_features, labels, config.rewire)
    else:
        kernel, indices, moved, _ = rewire(key, kernel, indices, in_features, config.rewire)

    def is_kernel(path):
        return [entry.key for entry in path[:2]] == ["output", "kernel"]

    optimizer = reset_moments(_optimizer(config), state["optimizer"], state["params"], is_kernel, moved)
    output["kernel"] = output["kernel"].replace(kernel)
    connectivity["indices"] = connectivity["indices"].replace(indices)
    return state | {"optimizer": optimizer}


# ---- in place ----


def init_in_place(config, params: nnx.State, other: nnx.State) -> dict:
    """As `init_optax`, and beside it the moments of the kernels and the bias that are updated in place."""
    own, rest = nnx.split_state(params, _updated_in_place, ...)
    state = {"params": params, "other": other, "optimizer": _optimizer(config).init(rest)}
    if "penultimate" in own:
        kernel = own["penultimate"]["kernel"][...]
        if config.moments == "factored":
            state["penultimate_moments"] = xla_ops.dense_factored_init(kernel)
        else:
            state["penultimate_moments"] = xla_ops.dense_adam_init(kernel, jnp.dtype(config.moments))
    if config.output_optimizer == "adam":
        output = own["output"]
        state["output_moments"] = xla_ops.adam_init(output["kernel"][...], output["bias"][...])
    return state


def step_in_place(graphdef, config, seed, state: dict, batch, learning_rate, step) -> tuple[dict, jax.Array]:
    """A step of a classifier with a fixed fan-in output layer. Returns the new state and the loss."""
    own, rest = nnx.split_state(state["params"], _updated_in_place, ...)
    new = dict(state)

    def embed(rest):
        model = nnx.merge(graphdef, nnx.merge_state(own, rest), state["other"], copy=True)
        return model.embed(batch.inputs), nnx.split(model, nnx.Param, ...)[2]

    x, embed_vjp, new["other"] = jax.vjp(embed, rest, has_aux=True)
    if "penultimate" not in own:
        loss, d_x = _step_output(config, seed, state, new, own["output"], x, batch, learning_rate, step)
        (grads,) = embed_vjp(d_x)
    else:
        kernel, bias = own["penultimate"]["kernel"], rest["penultimate"]["bias"]
        y = x @ kernel[...] + bias[...][None]
        hidden = jnp.maximum(y, 0)
        loss, d_hidden = _step_output(
            config, seed, state, new, own["output"], hidden, batch, learning_rate, step
        )
        dy = jnp.where(y > 0, d_hidden, 0)
        d_x = dy @ kernel[...].T if "embedding" in rest else jnp.zeros_like(x)
        (grads,) = embed_vjp(d_x)
        grads["penultimate"]["bias"] = bias.replace(dy.sum(axis=0))
        own["penultimate"]["kernel"] = _step_penultimate(
            config, state, new, x, dy, kernel, learning_rate, d_x
        )
    rest, new["optimizer"] = _apply(config, grads, state["optimizer"], rest, learning_rate)
    new["params"] = nnx.merge_state(own, rest)
    return new, loss


def _updated_in_place(path, _) -> bool:
    return path[0] == "output" or path == ("penultimate", "kernel")


def _step_output(config, seed, state, new, layer, x, batch, learning_rate, step):
    """Updates the output layer's parameters, and its moments in `new`. Returns the loss and x's gradient."""
    kernel, bias = layer["kernel"][...], layer["bias"][...]
    indices = state["other"]["output"]["indices"][...]
    arguments = (x.astype(kernel.dtype), kernel, indices, bias, batch.positives)
    rate = config.output_rate * learning_rate
    if config.output_optimizer == "adam":
        loss, d_x, kernel, bias, new["output_moments"] = xla_ops.fan_in_adam_step(
            *arguments, state["output_moments"], rate, loss=config.loss, epsilon=config.epsilon
        )
    else:
        rate = rate * (x.shape[0] * kernel.shape[0])  # the loss is a mean over both
        loss, d_x, kernel, bias = xla_ops.fan_in_sgd_step(
            *arguments, rate, seed=seed, step=step, loss=config.loss
        )
    layer["kernel"], layer["bias"] = layer["kernel"].replace(kernel), layer["bias"].replace(bias)
    return loss, d_x.astype(x.dtype)


def _step_penultimate(config, state, new, x, dy, kernel, learning_rate, before):
    """Returns the new kernel of the penultimate layer, and updates its moments in `new`."""
    if config.moments == "factored":
        step = xla_ops.dense_factored_step
    else:
        step = functools.partial(xla_ops.dense_adam_step, epsilon=config.epsilon)
    rate = config.penultimate_rate * learning_rate
    value, new["penultimate_moments"] = step(
        x, dy, kernel[...], state["penultimate_moments"], rate, before=before
    )
    return kernel.replace(value)


def rewire_in_place(config, in_features: int, labels: int, state: dict, key: jax.Array) -> dict:
    """Moves connections of a fixed fan-in output layer; what Adam remembers of them is forgotten."""
    output, connectivity = state["params"]["output"], state["other"]["output"]
    moments = state.get("output_moments")
    kernel, indices, _, of_kernel = rewire(
        key,
        output["kernel"][...],
        connectivity["indices"][...],
        in_features,
        config.rewire,
        moments=() if moments is None else (moments.mu_kernel, moments.nu_kernel),
    )
    output["kernel"] = output["kernel"].replace(kernel)
    connectivity["indices"] = connectivity["indices"].replace(indices)
    if moments is None:
        return state
    mu, nu = of_kernel
    return state | {"output_moments": moments._replace(mu_kernel=mu, nu_kernel=nu)}
