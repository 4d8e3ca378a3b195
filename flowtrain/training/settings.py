"""What a training run may be told."""

from dataclasses import dataclass, fields

from flowtrain.errors import ConfigError

CHOICES = {"optimizer": ("adam", "adamw"), "lr_decay": ("cosine", "plateau", "constant")}
# key: (smallest value, whether that value itself is allowed)
RANGES = {
    "steps": (1, True),
    "batch_size": (1, True),
    "lr": (0, False),
    "lr_warmup": (0, True),
    "lr_plateau_patience": (1, True),
    "weight_decay": (0, True),
    "clip_norm": (0, False),
    "ema": (0, False),
    "val_every": (1, True),
    "patience": (1, True),
    "log_every": (1, True),
    "plot_every": (1, True),
    "time_limit": (0, False),
}


@dataclass(frozen=True)
class Settings:
    """The trainer; configs/trainer/default.yaml explains every key.

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

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ConfigError(f"trainer.{key}={getattr(self, key)}: choose one of {', '.join(choices)}")
        for field in fields(self):
            if field.name in RANGES:
                self._check(field.name, field.type in (int, int | None), field.type in (int | None, float | None))
        if self.ema is not None and self.ema >= 1:
            raise ConfigError(f"trainer.ema={self.ema}: a decay lies between 0 and 1, as in 0.999; null turns it off")

    def _check(self, key: str, whole: bool, optional: bool) -> None:
        value = getattr(self, key)
        if value is None and optional:
            return
        lowest, allowed = RANGES[key]
        numeric = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        # "not >" rather than "<=" so that NaN is refused
        if not numeric or not (value > lowest or (allowed and value == lowest)):
            bound = f"at least {lowest}" if allowed else f"greater than {lowest}"
            null = ", or null" if optional else ""
            raise ConfigError(f"trainer.{key}={value}: give a {'whole ' if whole else ''}number {bound}{null}")
