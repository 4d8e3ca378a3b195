"""The options of all figures: the keys `plots.*` of a config."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtrain.data.tables.columns import default_names, pick
from flowtrain.utils.arguments import choose, flag, one_of
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.formatting import shown

FORMATS = ("png", "pdf", "svg")
# the defaults; configs of earlier versions lack some of these keys
DEFAULTS: dict[str, Any] = {"format": ["png"], "title": True, "columns": None}
# corner plots show tables of at least this many columns
LEAST_COLUMNS = 3


@dataclass(frozen=True)
class PlotOptions:
    """The options of all figures of a run.

    Attributes:
        formats: the file formats. Each figure is written once in each format.
        title: whether figures have a title.
        columns: the columns of a corner plot: names, positions and ranges of positions. None: the first columns.
    """

    formats: tuple[str, ...] = ("png",)
    title: bool = True
    columns: tuple[str | int, ...] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "PlotOptions":
        """Returns the options in the config of a run, with the defaults for keys that an older config lacks.

        Raises:
            ConfigError: an unknown key, or a value that is not valid.

        Example:
            >>> PlotOptions.of({"plots": {"format": "pdf"}})
            PlotOptions(formats=('pdf',), title=True, columns=None)
        """
        given = config.get("plots", {})
        if not isinstance(given, Mapping):
            keys = ", ".join(f"plots.{key}" for key in DEFAULTS)
            raise ConfigError(f"plots={shown(given)}: plots is a group of keys; set {keys}")
        for key in given:
            if key not in DEFAULTS:
                raise ConfigError(f"plots: unknown key {key}; {choose(key, DEFAULTS, 'the keys are')}")
        values = {**DEFAULTS, **given}
        return cls(_formats(values["format"]), flag("plots.title", values["title"]), _columns(values["columns"]))

    def files(self, path: Path) -> list[Path]:
        """Returns the files of a figure: `path` with the ending of each format.

        Example:
            >>> [file.name for file in PlotOptions(("png", "pdf")).files(Path("plots/curves.png"))]
            ['curves.png', 'curves.pdf']
        """
        return [path.with_suffix(f".{name}") for name in self.formats]

    def positions(self, event_shape: Sequence[int], names: Sequence[str] = ()) -> list[int] | None:
        """Returns the positions of the chosen columns in the order given; None if no columns are chosen.

        Args:
            event_shape: the shape of one sample.
            names: the names of the columns. If empty, they are c0, c1, ...

        Raises:
            ConfigError: a column that the table does not have, a column chosen twice, or data without corner plots.
        """
        if self.columns is None:
            return None
        if len(event_shape) != 1 or event_shape[0] < LEAST_COLUMNS:
            raise ConfigError(
                f"plots.columns={list(self.columns)}: only tables of {LEAST_COLUMNS} columns and more have corner "
                "plots; leave plots.columns out"
            )
        return pick(list(self.columns), names or default_names(range(event_shape[0])), "the table", "plots.columns")


def _formats(given: Any) -> tuple[str, ...]:
    """Returns the formats without duplicates."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError(
            f"plots.format={given}: give one or more of {', '.join(FORMATS)}, as in plots.format=[png,pdf]"
        )
    return tuple(dict.fromkeys(one_of("plots.format", name, FORMATS) for name in names))


def _columns(given: Any) -> tuple[str | int, ...] | None:
    if given is None:
        return None
    entries = [given] if isinstance(given, str | int) else given
    valid = isinstance(entries, list | tuple) and len(entries) > 0
    if not valid or any(isinstance(entry, bool) or not isinstance(entry, str | int) for entry in entries):
        raise ConfigError(
            f"plots.columns={given}: give names, positions or ranges of columns, as in plots.columns=[price,0,2:5]"
        )
    return tuple(entries)


DEFAULT = PlotOptions()
