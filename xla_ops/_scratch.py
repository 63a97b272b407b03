"""The memory that the CPU handlers take beside what XLA plans."""

import os
import re

_CALL = re.compile(r'"xla_ops\.(fan_in_[\w.]+)", operand_layout_constraints=\{(.*?)\}, \w+=')
_SHAPE = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")
_WITHOUT_GRADIENTS = ("fan_in_matmul.forward", "fan_in_loss.value", "fan_in_top_k")
_LANES = 16  # a batch is filled up to a multiple of these


def scratch_bytes(program: str) -> int:
    """About the most that an op in a compiled program takes on a CPU beside what XLA plans for it, in bytes.

    On a GPU XLA plans all of it.

    Args:
      program: the text of the compiled program, as of `jax.stages.Compiled.as_text`.
    """
    most = 0
    for name, operands in _CALL.findall(program):
        x, rows, *_ = _SHAPE.findall(operands)  # see csrc/fan_in_matmul.h
        batch, in_features = map(int, x[2].split(","))
        entries = 0 if "," in rows[2] else int(rows[2])  # without sparse inputs the kernel comes next
        examples = -(-batch // _LANES) * _LANES
        packed = (in_features + 1 + entries) * examples * int(x[1]) // 8
        sums = 0 if name in _WITHOUT_GRADIENTS else os.cpu_count() or 1  # of d_x, by each thread
        most = max(most, packed + 4 * sums * (in_features + 1) * examples)
    return most
