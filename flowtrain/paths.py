"""Where the configs are: beside the package in a checkout, inside it once installed."""

from pathlib import Path


def config_dir() -> Path:
    """Absolute path of the config folder, for a checkout, an editable install, a wheel and an sdist alike."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_groups() -> tuple[str, ...]:
    """The names of the config groups, sorted."""
    return tuple(sorted(p.name for p in config_dir().iterdir() if p.is_dir()))
