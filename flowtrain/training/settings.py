"""Settings of the trainer and their checks."""

from dataclasses import asdict, dataclass

from flowtrain.training.failure_policy import POLICIES
from flowtrain.utils.arguments import flag, number, one_of, whole
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.precision import PRECISIONS

CHOICES = {
    "optimizer": ("adam", "adamw", "muon"),
    "lr_decay": ("cosine", "plateau", "constant"),
    "precision": PRECISIONS,
    "on_nonfinite": POLICIES,
}
# the least value of each whole number
WHOLE = {
    "steps": 1,
    "batch_size": 1,
    "lr_warmup": 0,
    "lr_plateau_patience": 1,
    "val_every": 1,
    "patience": 1,
    "log_every": 1,
    "plot_every": 1,
    "guard_every": 1,
    "accumulate": 1,
    "val_size": 1,
    "max_rewinds": 0,
}
POSITIVE = ("lr", "clip_norm", "ema", "time_limit", "max_rise")
OPTIONAL = ("clip_norm", "ema", "patience", "plot_every", "time_limit", "guard_every", "val_size", "max_rise")
FLAGS = ("compile", "val_early")


@dataclass(frozen=True)
class Settings:
    """Settings of the trainer. configs/trainer/default.yaml explains every key.

    Raises:
        ConfigError: a value of the wrong type, out of range, or not among the choices.
    """

    steps: int
    batch_size: int
    optimizer: str
    lr: float
    lr_warmup: int
    lr_decay: str
    lr_plateau_patience: int
    weight_decay: float
    clip_norm: float | None
    ema: float | None
    val_every: int
    patience: int | None
    log_every: int
    plot_every: int | None
    time_limit: float | None
    # these have defaults, because configs in older checkpoints lack them
    compile: bool = False
    guard_every: int | None = 50
    # parts of a batch. Batch norms normalize each part by the statistics of the part
    accumulate: int = 1
    precision: str = "float32"
    val_size: int | None = None
    on_nonfinite: str = "stop"
    max_rewinds: int = 3
    val_early: bool = False
    max_rise: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in asdict(self).items() if v is not None or k not in OPTIONAL}
        for key, value in given.items():
            name = f"trainer.{key}"
            if key in FLAGS:
                flag(name, value)
            elif key in CHOICES:
                one_of(name, value, CHOICES[key])
            elif key in WHOLE:
                whole(name, value, WHOLE[key])
            else:
                number(name, value, inclusive=key not in POSITIVE)
        if self.accumulate > self.batch_size:
            raise ConfigError(
                f"trainer.accumulate={self.accumulate} is larger than trainer.batch_size={self.batch_size}: give at "
                "most one part per row"
            )
        if self.ema is not None and self.ema >= 1:
            raise ConfigError(f"trainer.ema={self.ema}: give a decay between 0 and 1, as in 0.999, or null for no EMA")
