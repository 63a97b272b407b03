"""Scratch memory of the CPU handlers, which XLA's memory plan does not include."""

import os
import re

# XLA decides when it compiles which calls a program has and of which shapes, and jaxlib before 0.12 shows the
# shapes of a compiled program only as text. The operands begin with x [B, D] and the rows of the sparse
# entries [N] (csrc/fan_in_layer.h).
_CALL = re.compile(
    r'"(xla_ops\.fan_in_[\w.]+)", operand_layout_constraints=\{(f32|bf16)\[(\d+),(\d+)\]\S* s32\[(\d+)\]'
)


def scratch_bytes(program: str) -> int:
    """Return an estimate of the largest scratch memory of any op in a compiled CPU program, in bytes.

    On a GPU, XLA's plan includes all memory.

    Args:
      program: text of the compiled program, from `jax.stages.Compiled.as_text`.
    """
    from xla_ops import _cpu  # here, so that xla_ops can be imported where the module is not built

    most = 0
    for handler, dtype, batch, in_features, num_entries in _CALL.findall(program):
        sizes = int(batch), int(in_features), int(num_entries), os.cpu_count() or 1
        most = max(most, _cpu.scratch_bytes(handler, dtype == "bf16", *sizes))
    return most
