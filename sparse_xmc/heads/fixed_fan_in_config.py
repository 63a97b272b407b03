"""The configuration of fixed fan-in heads, which makes them for one device or for a mesh."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from sparse_xmc.heads.fixed_fan_in import FixedFanInHead
from sparse_xmc.heads.head import OUTPUT_BIAS, Head, HeadConfig, HeadSpec
from sparse_xmc.heads.label_shard import LabelShard
from sparse_xmc.heads.layered import make_penultimate
from sparse_xmc.heads.sharded import ShardedHead
from sparse_xmc.layers import OUTPUT_BOUND, FixedFanInLinear, sparse_kernel_init
from sparse_xmc.settings import setting

# Smallest values that `FixedFanInConfig.smaller` proposes.
_LEAST = {"penultimate": 1024, "fan_in": 16}


@dataclasses.dataclass(frozen=True)
class FixedFanInConfig(HeadConfig):
    """Configuration of a fixed fan-in head.

    Attributes:
      penultimate: I, the width of the penultimate layer; 0 for none.
      fan_in: F, the number of inputs of each label.
      direct_inputs: maximum number of these inputs that are, at the start, direct inputs instead of hidden
        units: words of a bag of words, or features. They are selected for each label from the training
        points, and hidden units fill the remaining inputs. 0 for hidden units only, as in the paper.
      direct_scale: factor by which direct inputs are multiplied.
      output_bias: initial bias of all labels. -1 puts every label on the negative side of the squared hinge's
        margin, so that easy negatives have no gradient from the first step. For the loss "bce", -log(L) is
        suitable, the logit of the probability 1 / L. The paper uses 0.
      output_bound: the kernel is initialized uniformly in +-output_bound; None for the much smaller bound of
        the paper's code.
      distinct: whether the initial inputs of a label are distinct; the paper's code allows repeats.
      output_dtype: dtype of the output layer's parameters, "float32" or "bfloat16".
    """

    supports_mesh: ClassVar[bool] = True

    penultimate: int = setting(8192, at_least=0)
    fan_in: int = setting(32, at_least=1)
    direct_inputs: int = setting(0, at_least=0)
    direct_scale: float = setting(5.0, above=0)
    output_bias: float = OUTPUT_BIAS
    output_bound: float | None = setting(OUTPUT_BOUND, above=0, or_else=(None,))
    distinct: bool = True
    output_dtype: str = setting("float32", choices=("float32", "bfloat16"))

    @property
    def reads_direct_inputs(self) -> bool:
        return self.direct_inputs > 0

    def _make(self, spec: HeadSpec, rngs: nnx.Rngs) -> Head:
        """Make a new head, for one device or for a mesh.

        Raises:
          ValueError: `direct_inputs` exceeds `fan_in`; `direct_inputs` is set and `fan_in` exceeds the number
            of units; or features are to be direct inputs and there is no penultimate layer.
        """
        if self.direct_inputs > self.fan_in:
            raise ValueError(f"direct_inputs must be at most fan_in, {self.fan_in}, got {self.direct_inputs}")
        units = self.penultimate or spec.in_features
        # A label without training points has no direct inputs, and reads F distinct units.
        if self.direct_inputs and self.fan_in > units:
            raise ValueError(f"fan_in must be at most the number of units, {units}, got {self.fan_in}")
        if self._reads_features(spec) and not self.penultimate:
            raise ValueError(
                "without a penultimate layer labels read the features anyway; use direct_inputs=0"
            )
        head: FixedFanInHead | ShardedHead
        if spec.mesh is None:
            head = self._make_shard(spec, LabelShard.whole(spec.num_labels), rngs)
        else:
            head = ShardedHead.make(functools.partial(self._make_shard, spec), spec, rngs)
        if self.direct_inputs and spec.train is not None:
            head.connect_direct_inputs(self.direct_inputs, spec.train, rngs.params())
        return head

    def _make_shard(self, spec: HeadSpec, shard: LabelShard, rngs: nnx.Rngs) -> FixedFanInHead:
        """Make a head with random connections for a shard of the labels."""
        penultimate = make_penultimate(spec.in_features, self.penultimate, rngs)
        num_direct = spec.num_direct if self.direct_inputs else 0
        reads_features = self._reads_features(spec)
        output = FixedFanInLinear(
            (self.penultimate or spec.in_features) + (spec.in_features if reads_features else num_direct),
            shard.size,
            self.fan_in,
            distinct=self.distinct,
            param_dtype=jnp.dtype(self.output_dtype),
            kernel_init=sparse_kernel_init(self.output_bound, shard.global_num_labels, shard.first),
            bias_init=nnx.initializers.constant(self.output_bias),
            first_output=shard.first,
            rngs=rngs,
        )
        return FixedFanInHead(
            output,
            penultimate,
            num_direct=num_direct,
            reads_features=reads_features,
            direct_scale=self.direct_scale,
            shard=shard,
        )

    def _reads_features(self, spec: HeadSpec) -> bool:
        """Return whether the features are the direct inputs, as the encoder returns no others."""
        return self.direct_inputs > 0 and not spec.num_direct

    def in_bfloat16(self) -> "FixedFanInConfig":
        return dataclasses.replace(self, output_dtype="bfloat16")

    def smaller(self) -> Iterator["FixedFanInConfig"]:
        config = self
        for name, least in _LEAST.items():
            while (value := getattr(config, name)) >= 2 * least:
                config = dataclasses.replace(config, **{name: value // 2})
                yield config
