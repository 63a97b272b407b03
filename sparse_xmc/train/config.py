"""The training configuration of a classifier."""

import dataclasses

from sparse_xmc.heads import HeadTraining, RewireConfig
from sparse_xmc.settings import setting
from sparse_xmc.train.schedules import SCHEDULES


@dataclasses.dataclass(frozen=True)
class TrainingConfig(HeadTraining):
    """Training configuration of a classifier: the settings of its head (`HeadTraining`) and all others.

    Attributes:
      epochs: maximum number of epochs.
      batch_size: B, the number of points in a batch.
      learning_rate: base learning rate, with which the schedule starts. Each layer multiplies the learning
        rate of a step by its own multiplier.
      embedding_lr_multiplier: learning-rate multiplier of embedding tables, which Adagrad trains: a row moves
        by about this times the learning rate at its first use, and by less at each later use.
      encoder_lr_multiplier: learning-rate multiplier of all other parameters of the encoder, which AdamW
        trains unless `Trainer` is given another optimizer.
      encoder_warmup: number of steps over which the learning rate of the encoder rises linearly to its full
        value.
      encoder_weight_decay: AdamW's decoupled weight decay of the encoder's matrices, a fraction per step,
        multiplied by the learning rate of the encoder.
      schedule: "plateau" halves the learning rate when validation P@3 has not improved by 1e-3 for 2 epochs,
        down to 1e-4, and stops after 4 epochs without an improvement of 5e-5; training ends with the weights
        of the epoch with the best validation P@3. "linear" lowers the learning rate linearly to 0 over all
        `epochs`; training ends with the last weights.
      rewire: which connections a rewiring moves, and how.
      rewire_interval: number of steps between rewirings (the first is after step 1); -1 for one rewiring per
        epoch. With `active` growth a rewiring moves only connections of the labels of one batch, so the
        interval should be short, for example 20.
    """

    epochs: int = setting(100, at_least=1)
    batch_size: int = setting(32, at_least=1)
    learning_rate: float = setting(1e-3, above=0)
    embedding_lr_multiplier: float = setting(1.0, at_least=0)
    encoder_lr_multiplier: float = setting(1.0, at_least=0)
    encoder_warmup: int = setting(0, at_least=0)
    encoder_weight_decay: float = setting(0.0, at_least=0)
    schedule: str = setting("plateau", choices=tuple(SCHEDULES))
    rewire: RewireConfig = RewireConfig()
    rewire_interval: int = setting(1000, at_least=1, or_else=(-1,))
