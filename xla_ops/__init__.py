"""Fixed fan-in operations for JAX: native CPU and CUDA kernels behind plain functions."""

from xla_ops._arguments import index_dtype
from xla_ops._dense_step import DenseAdamState, dense_adam_init, dense_adam_step
from xla_ops._export import load_exported, save_exported
from xla_ops._fan_in_loss import fan_in_loss, fan_in_loss_reference
from xla_ops._fan_in_matmul import fan_in_matmul, fan_in_matmul_reference
from xla_ops._fan_in_step import AdamState, adam_init, fan_in_adam_step, fan_in_sgd_step
from xla_ops._fan_in_top_k import fan_in_top_k, fan_in_top_k_reference
from xla_ops._inputs import SparseInputs
from xla_ops._kth_smallest import kth_smallest_magnitude, kth_smallest_magnitude_reference
from xla_ops._native import platforms, register
from xla_ops._rounding import round_stochastically
from xla_ops._scratch import scratch_bytes

__all__ = [
    "AdamState",
    "DenseAdamState",
    "SparseInputs",
    "adam_init",
    "dense_adam_init",
    "dense_adam_step",
    "fan_in_adam_step",
    "fan_in_loss",
    "fan_in_loss_reference",
    "fan_in_matmul",
    "fan_in_matmul_reference",
    "fan_in_sgd_step",
    "fan_in_top_k",
    "fan_in_top_k_reference",
    "index_dtype",
    "kth_smallest_magnitude",
    "kth_smallest_magnitude_reference",
    "load_exported",
    "platforms",
    "register",
    "round_stochastically",
    "save_exported",
    "scratch_bytes",
]
