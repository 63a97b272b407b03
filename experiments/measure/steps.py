"""The time of training steps beside lower bounds, and both tables of steps, for `experiments.benchmark`.

A lower bound ("floor") of the time of a part of a step assumes bytes at the speed of a memory copy, gathers
at the speed of the forward pass of `fan_in_loss`, and products at the speed of a large matrix product. Memory
is measured by `experiments.measure.step_memory`.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import xla_ops
from sparse_xmc.cli import environment
from sparse_xmc.data.batches import Batch
from sparse_xmc.heads import FixedFanInHead, StepInputs
from sparse_xmc.heads.updates import next_moments, step_dense
from sparse_xmc.train import Trainer

from . import clock
from .step_memory import measure_memory
from .workloads import BATCH_SIZE, Network, stepper

# The initial bias of all labels, and the number of gathers in a step: forward, and for both gradients if any.
DENSITIES = {"density 1": (0.0, 3), "density near 0": (-2.0, 1)}
_RATE = 1e-6  # so low that the density of the gradient does not change


def measure(networks: Sequence[Network], modes: Sequence[str], repeats: int, memory_steps: int) -> dict:
    """Print the time of the first network and the memory of all; return a report serializable as JSON."""
    times = {mode: measure_time(networks[0], mode, repeats) for mode in modes}
    for mode, report in times.items():
        print("\n".join(time_lines(networks[0], mode, report)), flush=True)
    memory = measure_memory(networks, modes, memory_steps)
    return {
        "time_of": networks[0]._asdict(),
        "time": times,
        "memory": memory,
        "environment": environment.describe(),
    }


def measure_time(network: Network, mode: str, repeats: int, now: clock.Clock = time.perf_counter) -> dict:
    """Measure the seconds of a step and of its parts by the clock `now`, each beside its lower bound."""
    copy, product = clock.copy_gb_per_second() * 1e9, _product_flops_per_second(now)
    products = 2 * BATCH_SIZE * network.features * network.penultimate / product
    weights, dense = network.labels * network.fan_in, network.features * network.penultimate
    report = {}
    for name, (bias, gathers) in DENSITIES.items():
        start = f"--output_bias={bias}", "--output_bound=none"  # Initial logits are almost exactly the bias.
        trainer, batches = network.trainer(mode, *start), network.batches(4)
        calls = _parts(trainer, batches[0])
        calls["step"] = stepper(trainer, batches, _RATE)
        jax.block_until_ready(calls["step"]())  # The first step is followed by a rewiring.
        times = clock.interleaved_times(calls, repeats, clock=now)
        seconds = {part: float(np.median(t)) for part, t in times.items()}

        weight_bytes, moment_bytes = _bytes_per_weight(trainer, "output")
        # A step reads and writes weights and moments. SGD has no moments, and writes nothing without a
        # gradient.
        updated = (2 if moment_bytes or gathers > 1 else 1) * (weight_bytes + moment_bytes)
        index = trainer.state["other"]["head"]["output"]["indices"].dtype.itemsize
        floors = {
            "penultimate forward": products + 4 * dense / copy,
            "output layer": gathers * seconds["gather"] + weights * (updated + index) / copy,
            "penultimate update": products
            + 2 * sum(_bytes_per_weight(trainer, "penultimate")) * dense / copy,
        }
        report[name] = {
            "seconds": seconds,
            "floor_seconds": floors,
            "step_over_floors": seconds["step"] / sum(floors.values()),
        }
    return {"copy_gb_per_second": copy / 1e9, "gemm_gflops": product / 1e9, **report}


def time_lines(network: Network, mode: str, report: dict) -> list[str]:
    """Render the time table of one mode for the terminal."""
    sizes = f"{network.labels:,} labels, fan-in {network.fan_in}, {network.penultimate:,} penultimate"
    lines = [f"{network.data}, {sizes}, {mode}; ms (floor)"]
    for density in DENSITIES:
        seconds, floors = report[density]["seconds"], report[density]["floor_seconds"]
        parts = [f"{part} {1e3 * seconds[part]:.1f} ({1e3 * floor:.1f})" for part, floor in floors.items()]
        whole = f"step {1e3 * seconds['step']:.1f} ({1e3 * sum(floors.values()):.1f})"
        rest = seconds["step"] - sum(seconds[part] for part in floors)
        lines.append(
            f"  {density}: {whole} = {report[density]['step_over_floors']:.2f} floors: "
            + ", ".join(parts)
            + f", the rest {1e3 * rest:.1f}; gather {1e3 * seconds['gather']:.1f}"
        )
    return lines


def _parts(trainer: Trainer, batch: Batch) -> dict[str, Callable[[], Any]]:
    """Return the parts of a step as functions without arguments, on a copy of a trainer's head."""
    training, head = trainer.config, trainer.model.head
    assert isinstance(head, FixedFanInHead)  # true for all networks
    graphdef, state = nnx.split(head)
    held = jax.tree.map(jnp.copy, [state, trainer.state["moments"]])
    x, positives = jnp.asarray(batch.inputs), jnp.asarray(batch.positives)

    def head_of(state: nnx.State) -> FixedFanInHead:
        return nnx.merge(graphdef, state, copy=True)

    forward = jax.jit(lambda state, x: head_of(state).output_inputs(x)[0])
    gather = jax.jit(
        lambda state, hidden: xla_ops.fan_in_loss(
            *head_of(state).output.cast(hidden), positives, loss=training.loss
        )
    )
    hidden = forward(held[0], x)
    d_y = jax.random.normal(jax.random.key(0), hidden.shape)

    def updating(update):
        """Return a function that updates one layer of the held head in place.

        Args:
          update: function that returns the new moments of the layer.
        """

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(state, moments, layer_inputs):
            head = head_of(state)
            updated = update(head, moments, layer_inputs)
            return nnx.state(head), next_moments(moments, updated)

        def run(layer_inputs):
            held[:] = step(*held, layer_inputs)
            return held

        return run

    def inputs_of(x, wants_d_x):
        return StepInputs(x, positives, jnp.float32(_RATE), trainer.seed, jnp.int32(0), wants_d_x)

    def update_output(head, moments, hidden):
        return head.step_output(inputs_of(hidden, True), None, moments, training)[2]

    def update_penultimate(head, moments, x_and_d_y):
        x, d_y = x_and_d_y
        layer, inputs = head.penultimate, inputs_of(x, False)
        epsilon = training.epsilon_for(head.num_labels)
        return step_dense(layer, "penultimate", d_y, inputs, moments, lr_multiplier=1.0, epsilon=epsilon)[1]

    return {
        "gather": lambda: gather(held[0], hidden),
        "penultimate forward": lambda: forward(held[0], x),
        "output layer": functools.partial(updating(update_output), hidden),
        "penultimate update": functools.partial(updating(update_penultimate), (x, d_y)),
    }


def _bytes_per_weight(trainer: Trainer, layer: str) -> tuple[int, int]:
    """Return the bytes of each weight of a layer's kernel, and of its optimizer state."""
    moments = trainer.state["moments"]
    kernel_moments = [m[f"{layer}.kernel"] for m in (moments.mu, moments.nu) if f"{layer}.kernel" in m]
    kernel = trainer.state["params"]["head"][layer]["kernel"]
    return kernel.dtype.itemsize, sum(array.dtype.itemsize for array in kernel_moments)


def _product_flops_per_second(now: clock.Clock, size: int = 2048) -> float:
    a = jnp.ones((size, size), jnp.float32)
    times = clock.interleaved_times({"product": functools.partial(jax.jit(jnp.matmul), a, a)}, 5, clock=now)
    return 2 * size**3 / min(times["product"])
