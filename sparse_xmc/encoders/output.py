"""The output of encoders, which is the input of heads."""

from typing import NamedTuple

from jax import Array

from xla_ops import SparseInputs


class EncoderOutput(NamedTuple):
    """The features of a batch, with the direct inputs that labels can read beside them.

    Attributes:
      features: float32 [B, E], the features.
      direct: the direct inputs, sparse [B, V], such as the bags of words of the batch; or None.
    """

    features: Array
    direct: SparseInputs | None


def as_encoder_output(output: Array | EncoderOutput) -> EncoderOutput:
    """Return the output of any encoder as `EncoderOutput`; an array [B, E] has no direct inputs."""
    return output if isinstance(output, EncoderOutput) else EncoderOutput(output, None)
