"""Scratch memory of the CPU handlers, which XLA's memory plan does not include."""

import os
import re

_CALL = re.compile(r'"xla_ops\.(fan_in_[\w.]+)", operand_layout_constraints=\{(.*?)\}, \w+=')
_SHAPE = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")
_WITHOUT_GRADIENTS = ("fan_in_matmul.forward", "fan_in_loss.value", "fan_in_top_k")
_LANES = 16  # Batches are padded to a multiple of this.


def scratch_bytes(program: str) -> int:
    """Return an estimate of the largest scratch memory of any op in a compiled CPU program, in bytes.

    On a GPU, XLA's plan includes all memory.

    Args:
      program: text of the compiled program, from `jax.stages.Compiled.as_text`.
    """
    most = 0
    for name, operands in _CALL.findall(program):
        x, rows, *_ = _SHAPE.findall(operands)  # see csrc/fan_in_matmul.h
        batch, in_features = map(int, x[2].split(","))
        entries = 0 if "," in rows[2] else int(rows[2])  # Without sparse inputs, the kernel follows x.
        examples = -(-batch // _LANES) * _LANES
        packed = (in_features + 1 + entries) * examples * int(x[1]) // 8
        sums = 0 if name in _WITHOUT_GRADIENTS else os.cpu_count() or 1  # d_x is summed by each thread.
        most = max(most, packed + 4 * sums * (in_features + 1) * examples)
    return most
