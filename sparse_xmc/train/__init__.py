"""Training: configuration, training step, training loop, schedules, callbacks and checkpoints."""

from sparse_xmc.train.callbacks import Callback, GradientDensity, Progress, RecordFile
from sparse_xmc.train.checkpoints import Checkpoints
from sparse_xmc.train.config import TrainingConfig
from sparse_xmc.train.loop import Stopped, fit
from sparse_xmc.train.schedules import SCHEDULES, Linear, Plateau, Schedule
from sparse_xmc.train.trainer import Trainer

__all__ = [
    "SCHEDULES",
    "Callback",
    "Checkpoints",
    "GradientDensity",
    "Linear",
    "Plateau",
    "Progress",
    "RecordFile",
    "Schedule",
    "Stopped",
    "Trainer",
    "TrainingConfig",
    "fit",
]
