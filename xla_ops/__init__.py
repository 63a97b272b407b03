"""Fixed fan-in operations for JAX: native CPU kernels behind plain, differentiable functions."""

from xla_ops._arguments import index_dtype
from xla_ops.fan_in_matmul import fan_in_matmul, fan_in_matmul_reference

__all__ = ["fan_in_matmul", "fan_in_matmul_reference", "index_dtype"]
