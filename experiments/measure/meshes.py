"""Memory and communication of each device of a mesh in a training step, for `label_scale --mesh`.

The arrays of the training state are counted on the first device. XLA's memory plan of a step, and the data
that the step sends between devices, are read from the compiled program of one device. They are compared with
a formula for the data that must be sent: the gradient of the output layer's input, and the features if the
batch is sharded.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparse_xmc.cli import environment
from sparse_xmc.mesh import data_size
from sparse_xmc.modules import key_path_names, path_name
from sparse_xmc.train import Trainer

from .workloads import BATCH_SIZE, NUM_FEATURES, Scale, make_batches, make_trainer

_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2}


def measure(scale: Scale, model: str, mesh: Mesh) -> dict[str, Any]:
    """Take a training step, and report memory and communication of each device, serializable as JSON.

    Args:
      scale: the number of labels, and the statistics of the data.
      model: name of a flagfile in sparse_xmc/cli/flags/models, without its suffix.
      mesh: the mesh.
    """
    arguments = [f"--flagfile=experiments/flags/models/{model}.cfg", f"--batch_size={BATCH_SIZE}"]
    trainer = make_trainer(arguments, NUM_FEATURES, scale.labels, mesh=mesh)
    (batch,) = make_batches(scale.labels, scale.labels_per_point, count=1)
    compiled = trainer.trace(batch)["step"].lower().compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"XLA does not report the memory of a step on {jax.default_backend()}")
    jax.block_until_ready(trainer.train_step(batch, 1e-3))
    sent = collectives(compiled.as_text() or "") if mesh.size > 1 else []
    features = NUM_FEATURES if data_size(mesh) > 1 else 0
    inputs = trainer.state["params"]["head"].get("penultimate")
    width = NUM_FEATURES if inputs is None else inputs["kernel"].shape[1]
    return {
        "scale": scale._asdict(),
        "model": model,
        "mesh": dict(mesh.shape),
        "batch_size": BATCH_SIZE,
        "bytes_per_device": bytes_on_first_device(trainer),
        "step_argument_bytes": analysis.argument_size_in_bytes,
        "step_temporary_bytes": analysis.temp_size_in_bytes,
        "sent": [{"op": op, "bytes": size} for op, size in sent],
        "sent_bytes": sum(size for _, size in sent),
        "formula_bytes": 4 * BATCH_SIZE * (width + features) if mesh.size > 1 else 0,
        "environment": environment.describe(),
    }


def bytes_on_first_device(trainer: Trainer) -> dict[str, int]:
    """Return the bytes of the training state on the first device, of sharded and of replicated arrays."""
    first = jax.local_devices()[0]
    parts = {"split by labels": 0, "on all devices": 0}
    for path, array in jax.tree_util.tree_leaves_with_path(trainer.state):
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            continue
        name = path_name(key_path_names(path))
        local_bytes = sum(shard.data.nbytes for shard in array.addressable_shards if shard.device == first)
        parts["split by labels" if "output" in name.split(".") else "on all devices"] += local_bytes
    return parts


def collectives(program: str) -> list[tuple[str, int]]:
    """Return the collective operations of a compiled program, each with the bytes of its results."""
    found = []
    for line in program.splitlines():
        matched = re.search(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(", line)
        if matched:
            found.append((matched[2], _bytes_of(matched[1])))
    return found


def _bytes_of(shapes: str) -> int:
    """Return the number of bytes of HLO shapes, such as "(f32[8,24]{1,0}, s32[])"."""
    total = 0
    for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
        default = int(re.sub(r"\D", "", dtype) or 8) // 8
        total += _DTYPE_BYTES.get(dtype, default) * int(np.prod([int(d) for d in dims.split(",") if d]))
    return total


def line(report: dict[str, Any]) -> str:
    """Render a report as a line for the terminal."""
    on_device = report["bytes_per_device"]
    mesh = ", ".join(f"{axis}:{size}" for axis, size in report["mesh"].items())
    return (
        f"{report['scale']['labels']:,} labels, {mesh}: MiB on a device: "
        f"{on_device['split by labels'] / 2**20:,.1f} split by labels, "
        f"{on_device['on all devices'] / 2**20:,.1f} on all, "
        f"{report['step_temporary_bytes'] / 2**20:,.1f} temporaries of a step; "
        f"{report['sent_bytes'] / 2**20:.2f} sent in a step, by the formula "
        f"{report['formula_bytes'] / 2**20:.2f}"
    )
