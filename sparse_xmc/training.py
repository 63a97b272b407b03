"""The training loop: steps, rewiring, learning rate, early stopping."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparse_xmc.data.batches import Batch, Batches
from sparse_xmc.layers import FixedFanInLinear
from sparse_xmc.losses import LOSSES
from sparse_xmc.models import Classifier
from sparse_xmc.rewire import RewireConfig, reset_moments, rewire, rewire_unstructured
from sparse_xmc.unstructured import UnstructuredLinear
from xla_ops import adam_init, fan_in_adam_step, fan_in_sgd_step

# The paper's framework adds this to the root of the second moment; Optax's default is 1e-8. Gradients of a
# mean over 10^5 labels are as small as that.
PAPER_EPSILON = 1e-7

SCHEDULES = ("plateau", "linear")
OPTIMIZERS = ("adam", "sgd")
MOMENTS = ("float32", "bfloat16", "factored")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a classifier is trained.

    Attributes:
      epochs: the most epochs to train.
      batch_size: B.
      loss: one of `sparse_xmc.losses.LOSSES`.
      learning_rate: Adam's, at the start.
      embedding_rate: the embedding learns at this times the learning rate. Adam moves a weight by about the
        learning rate, whatever the gradient; embeddings are large, and few batches have a given word.
      penultimate_rate: the penultimate layer learns at this times the learning rate; its weights are small.
      output_rate: the output layer learns at this times the learning rate.
      output_optimizer: "adam", or "sgd" without momentum, which keeps no moments. SGD follows the sum of the
        losses over batch and labels, not the mean, so that its rate depends on neither's number. A fixed
        fan-in layer is updated in place, without a gradient of the kernel in memory
        (`xla_ops.fan_in_adam_step`, `xla_ops.fan_in_sgd_step`; the latter rounds bfloat16 weights
        stochastically).
      moments: what Adam keeps of the layers in front of the output layer: both moments in "float32"; the
        first in "bfloat16"; or "factored": no first moment, and of the second the means of rows and columns
        (Adafactor's, `optax.scale_by_factored_rms`).
      epsilon: Adam's.
      schedule: "plateau" halves the learning rate when validation P@3 has not improved by 1e-3 for 2 epochs,
        down to 1e-4, and stops after 4 epochs without an improvement of 5e-5; "linear" lowers it evenly to 0
        over all `epochs`. The first ends with the weights of the epoch with the best validation P@3, the
        second with the last.
      rewire: which connections a rewiring moves, and how; None for never.
      rewire_interval: after how many steps a rewiring follows (the first after step 1); -1 for once an epoch.
    """

    epochs: int = 100
    batch_size: int = 32
    loss: str = "squared_hinge"
    learning_rate: float = 1e-3
    embedding_rate: float = 1.0
    penultimate_rate: float = 1.0
    output_rate: float = 1.0
    output_optimizer: str = "adam"
    moments: str = "float32"
    epsilon: float = PAPER_EPSILON
    schedule: str = "plateau"
    rewire: RewireConfig | None = RewireConfig()
    rewire_interval: int = 1000

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices = {
            "loss": LOSSES,
            "schedule": SCHEDULES,
            "output_optimizer": OPTIMIZERS,
            "moments": MOMENTS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.rewire_interval < 1 and self.rewire_interval != -1:
            raise ValueError(
                f"rewire_interval must be positive, or -1 for once an epoch, got {self.rewire_interval}"
            )


@dataclasses.dataclass
class Plateau:
    """Halving the learning rate and stopping early, as the paper does by P@3 on the validation points.

    Attributes:
      learning_rate: the present one.
      best: the best metric so far.
    """

    learning_rate: float
    best: float = -np.inf
    epochs_since_best: int = 0
    _best_for_halving: float = -np.inf
    _epochs_since_halving: int = 0

    def update(self, metric: float) -> None:
        """Takes the metric at the end of an epoch."""
        if metric > self.best + 5e-5:
            self.best, self.epochs_since_best = metric, 0
        else:
            self.epochs_since_best += 1
        if metric > self._best_for_halving + 1e-3:
            self._best_for_halving, self._epochs_since_halving = metric, 0
            return
        self._epochs_since_halving += 1
        if self._epochs_since_halving >= 2:
            self.learning_rate = max(self.learning_rate / 2, min(self.learning_rate, 1e-4))
            self._epochs_since_halving = 0

    @property
    def should_stop(self) -> bool:
        """Whether 4 epochs have passed without an improvement."""
        return self.epochs_since_best >= 4


class Trainer:
    """Trains a `Classifier` in place of its initial weights.

    Args:
      model: the classifier; its arrays are donated to the first step, so use `Trainer.model` afterwards.
      config: how to train.
      seed: of the order of the points and of rewiring.

    Attributes:
      state: all that changes: parameters, connectivity, random state, moments. A pytree.
      step: the number of steps taken.
    """

    def __init__(self, model: Classifier, config: TrainingConfig, *, seed: int):
        self.config = config
        self.seed = seed
        self.step = 0
        self._in_place = isinstance(model.output, FixedFanInLinear)
        self._rewires = config.rewire is not None and not isinstance(model.output, nnx.Linear)
        self._tx = _optimizer(config, model.config.num_labels)
        self._graphdef, params, other = nnx.split(model, nnx.Param, ...)
        self.state = {"params": params, "other": other}
        if self._in_place:
            self.state["optimizer"] = self._tx.init(_in_front(params))
            if config.output_optimizer == "adam":
                output = params["output"]
                self.state["output_moments"] = adam_init(output["kernel"][...], output["bias"][...])
        else:
            self.state["optimizer"] = self._tx.init(params)
        train_step = _fan_in_train_step if self._in_place else _train_step
        self._train_step = jax.jit(
            functools.partial(train_step, self._graphdef, self._tx, config, seed), donate_argnums=0
        )
        rewire_output = functools.partial(_rewire, config.rewire, model.output.in_features)
        if isinstance(model.output, UnstructuredLinear):
            rewire_output = functools.partial(
                _rewire_unstructured,
                config.rewire,
                self._tx,
                model.output.in_features,
                model.output.out_features,
            )
        self._rewire = jax.jit(rewire_output, donate_argnums=0)

    @property
    def model(self) -> Classifier:
        """The classifier with the present weights."""
        return nnx.merge(self._graphdef, self.state["params"], self.state["other"])

    def train_step(self, batch: Batch, learning_rate: float) -> jax.Array:
        """One step, and the rewiring that falls due after it. Returns the loss (not waited for)."""
        self.state, loss = self._train_step(self.state, batch, np.float32(learning_rate), np.int32(self.step))
        self.step += 1
        interval = self.config.rewire_interval
        if interval != -1 and self.step % interval == 1 % interval:
            self.rewire()
        return loss

    def rewire(self) -> None:
        """Moves connections of the output layer now, if it has any and the configuration says so."""
        if self._rewires:
            key = jax.random.fold_in(jax.random.key(self.seed), self.step)
            self.state = self._rewire(self.state, key)

    def epoch(
        self, batches: Batches, epoch: int, learning_rate: Callable[[int], float]
    ) -> Iterator[jax.Array]:
        """Trains for one epoch, yielding each step's loss.

        Args:
          batches: the training points.
          epoch: the epoch's number, from 0; with the seed it fixes the order of the points.
          learning_rate: from a step's number within the epoch.
        """
        if self.config.rewire_interval == -1 and epoch > 0:
            self.rewire()  # not at an epoch's end: what is evaluated has had time to use its connections
        for i, batch in enumerate(batches.shuffled(self.seed, epoch)):
            yield self.train_step(batch, learning_rate(i))


def _optimizer(config: TrainingConfig, num_labels: int) -> optax.GradientTransformation:
    """What turns gradients into steps, but for the learning rate and a fixed fan-in output layer."""
    if config.moments == "factored":
        tx = optax.scale_by_factored_rms()
    else:
        tx = optax.scale_by_adam(eps=config.epsilon, mu_dtype=jnp.dtype(config.moments))
    output_rate = config.output_rate
    if config.output_optimizer == "sgd":
        tx = optax.masked(tx, lambda params: _is_layer(params, lambda name: name != "output"))
        output_rate *= config.batch_size * num_labels
    rates = {
        "embedding": config.embedding_rate,
        "penultimate": config.penultimate_rate,
        "output": output_rate,
    }
    return optax.chain(tx, *(_scale_layer(name, rate) for name, rate in rates.items()))


def _scale_layer(layer: str, factor: float) -> optax.GradientTransformation:
    return optax.masked(optax.scale(factor), lambda params: _is_layer(params, lambda name: name == layer))


def _is_layer(params, condition):
    """For each parameter, whether the name of its layer satisfies a condition."""
    return jax.tree_util.tree_map_with_path(lambda path, _: condition(path[0].key), params)


def _in_front(params: nnx.State) -> nnx.State:
    """The parameters of all layers but the output layer."""
    return nnx.State({name: layer for name, layer in params.items() if name != "output"})


def _apply(tx, grads, optimizer, params, learning_rate):
    updates, optimizer = tx.update(grads, optimizer, params)
    return jax.tree.map(lambda p, u: p - (learning_rate * u).astype(p.dtype), params, updates), optimizer


def _train_step(graphdef, tx, config, seed, state, batch, learning_rate, step):
    """A step of a classifier with any output layer."""

    def loss_of(params, other):
        model = nnx.merge(graphdef, params, other, copy=True)
        loss = model.loss(batch.inputs, batch.positives, config.loss)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    (loss, other), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"], state["other"])
    params, optimizer = _apply(tx, grads, state["optimizer"], state["params"], learning_rate)
    return {"params": params, "other": other, "optimizer": optimizer}, loss


def _fan_in_train_step(graphdef, tx, config, seed, state, batch, learning_rate, step):
    """A step of a classifier with a fixed fan-in output layer, which is updated in place."""
    front, output = _in_front(state["params"]), state["params"]["output"]

    def output_inputs(front):
        model = nnx.merge(graphdef, nnx.State({**front, "output": output}), state["other"], copy=True)
        x, *layer = model.output.cast(model.features(batch.inputs))
        return x, (layer, nnx.split(model, nnx.Param, ...)[2])

    x, vjp, ((kernel, indices, bias), other) = jax.vjp(output_inputs, front, has_aux=True)
    arguments = (x, kernel, indices, bias, batch.positives)
    rate = config.output_rate * learning_rate
    new_state = {"other": other}
    if config.output_optimizer == "adam":
        loss, d_x, kernel, bias, new_state["output_moments"] = fan_in_adam_step(
            *arguments, state["output_moments"], rate, loss=config.loss, epsilon=config.epsilon
        )
    else:
        rate = rate * (len(x) * len(kernel))
        loss, d_x, kernel, bias = fan_in_sgd_step(*arguments, rate, seed=seed, step=step, loss=config.loss)
    front, new_state["optimizer"] = _apply(tx, *vjp(d_x), state["optimizer"], front, learning_rate)
    output = {"kernel": output["kernel"].replace(kernel), "bias": output["bias"].replace(bias)}
    new_state["params"] = nnx.State({**front, "output": output})
    return new_state, loss


def _rewire(config, in_features, state, key):
    """Moves connections of a fixed fan-in output layer; what Adam remembers of them is forgotten."""
    kernel, indices = state["params"]["output"]["kernel"], state["other"]["output"]["indices"]
    moments = state.get("output_moments")
    of_kernel = () if moments is None else (moments.mu_kernel, moments.nu_kernel)
    new_kernel, new_indices, _, of_kernel = rewire(
        key, kernel[...], indices[...], in_features, config, moments=of_kernel
    )
    _set_connections(state, new_kernel, new_indices)
    if moments is not None:
        mu, nu = of_kernel
        state["output_moments"] = moments._replace(mu_kernel=mu, nu_kernel=nu)
    return state


def _rewire_unstructured(config, tx, in_features, labels, state, key):
    """Moves connections of an unstructured output layer; the optimizer forgets what it knows of them."""
    kernel, indices = state["params"]["output"]["kernel"], state["other"]["output"]["indices"]
    kernel, indices, moved = rewire_unstructured(key, kernel[...], indices[...], in_features, labels, config)
    optimizer = reset_moments(tx, state["optimizer"], state["params"], _is_output_kernel, moved)
    _set_connections(state, kernel, indices)
    return state | {"optimizer": optimizer}


def _is_output_kernel(path) -> bool:
    return [entry.key for entry in path[:2]] == ["output", "kernel"]


def _set_connections(state, kernel, indices):
    """Puts other weights and connections of the output layer into the state."""
    output, connectivity = state["params"]["output"], state["other"]["output"]
    output["kernel"] = output["kernel"].replace(kernel)
    connectivity["indices"] = connectivity["indices"].replace(indices)
