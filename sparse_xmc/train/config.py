"""How a classifier is trained, as settings."""

import dataclasses

from sparse_xmc.heads import HeadTraining, RewireConfig
from sparse_xmc.settings import setting
from sparse_xmc.train.schedules import SCHEDULES


@dataclasses.dataclass(frozen=True)
class TrainingConfig(HeadTraining):
    """How a classifier is trained; what concerns its head is in `HeadTraining`.

    Attributes:
      epochs: the most epochs to train.
      batch_size: B.
      learning_rate: at the start; that of the head, and times the factors of its parts theirs.
      embedding_rate: tables of embeddings learn at this times the learning rate, by Adagrad: a row moves by
        this much at its first use, and by less at each further one.
      encoder_rate: all else of the encoder learns at this times the learning rate, by AdamW, unless `Trainer`
        is given another optimizer.
      encoder_warmup: over how many steps that rate rises to this.
      encoder_weight_decay: the part of its matrices that decays in a step, times that rate.
      schedule: "plateau" halves the learning rate when validation P@3 has not improved by 1e-3 for 2 epochs,
        down to 1e-4, and stops after 4 epochs without an improvement of 5e-5; "linear" lowers it evenly to 0
        over all `epochs`. The first ends with the weights of the epoch with the best validation P@3, the
        second with the last.
      rewire: which connections a rewiring moves, and how.
      rewire_interval: after how many steps a rewiring follows (the first after step 1); -1 for once an epoch.
        With `active` growth only labels of the step's batch are rewired, so that it is short, 20 say.
    """

    epochs: int = setting(100, at_least=1)
    batch_size: int = setting(32, at_least=1)
    learning_rate: float = setting(1e-3, above=0)
    embedding_rate: float = setting(1.0, at_least=0)
    encoder_rate: float = setting(1.0, at_least=0)
    encoder_warmup: int = setting(0, at_least=0)
    encoder_weight_decay: float = setting(0.0, at_least=0)
    schedule: str = setting("plateau", choices=tuple(SCHEDULES))
    rewire: RewireConfig = RewireConfig()
    rewire_interval: int = setting(1000, at_least=1, or_else=(-1,))
