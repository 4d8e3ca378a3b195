"""The files that `floweval` writes, and the training curves that it draws again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowtrain.cli.load_run import LoadedRun, same_data
from flowtrain.cli.output_files import check_outputs, run_dir_of
from flowtrain.data.tables.output import NAMED, check_can_write
from flowtrain.plotting.options import DEFAULT, FORMATS, PlotOptions
from flowtrain.runs.search import metrics_of, validations_of


class OutputPaths:
    """The paths of the files that an evaluation writes: in the run directory, or beside `out` with the name of `out`.

    Args:
        run_dir: the run directory.
        out: the JSON file, or None for a file in the run directory.
        scores: the file of log p, or None.
        name: the name of the evaluated set, see `set_name`.
        options: the options of figures, such as the file formats.
        grid: the file of the density grid, or None.
        anomalies: the file of anomalies, or None.
    """

    def __init__(
        self,
        run_dir: Path,
        out: Path | None,
        scores: Path | None,
        name: str,
        options: PlotOptions = DEFAULT,
        grid: Path | None = None,
        anomalies: Path | None = None,
    ) -> None:
        self.run_dir, self.out, self.scores, self.suffix = run_dir, out, scores, name and f"-{name}"
        self.options, self.grid, self.anomalies = options, grid, anomalies
        self.json = out or run_dir / f"eval{self.suffix}.json"
        # callers replace the suffix .json by .md or .html. Without it, they would replace a part of a name with a dot
        self.report = out or run_dir / f"report{self.suffix}.json"

    @property
    def other_scores(self) -> Path:
        """The file of log p of the second set, beside the scores."""
        assert self.scores is not None
        return self.scores.with_name(f"{self.scores.stem}_ood{self.scores.suffix}")

    @property
    def member_scores(self) -> Path:
        """The file of log p of the members of an ensemble, beside a .npy file of scores."""
        assert self.scores is not None
        return self.scores.with_name(f"{self.scores.stem}_members.npy")

    def check(self, ood: bool, sbc: bool, report: bool, ensemble: bool, inputs: list[Any]) -> None:
        """Checks all paths before the evaluation begins; see `check_outputs`."""
        paths = [self.json, *self.options.files(self.figure("calibration"))]
        paths += self.options.files(self.figure("ood")) if ood else []
        paths += self.options.files(self.figure("sbc")) if sbc else []
        paths += [] if self.scores is None else [self.scores, *([self.other_scores] if ood else [])]
        if self.scores is not None:
            paths += [] if self.scores.suffix in NAMED else [self.member_scores] * ensemble
            check_can_write(self.scores)
        paths += [] if self.grid is None else [self.grid]
        if self.anomalies is not None:
            paths += [self.anomalies, *self.options.files(self.figure("anomalies"))]
            check_can_write(self.anomalies)
        paths += [self.report.with_suffix(ending) for ending in (".md", ".html")] if report else []
        check_outputs(paths, inputs)

    def figure(self, name: str) -> Path:
        """Returns the path of the PNG file of a figure. Other formats have the same path with another suffix."""
        if self.out is None:
            return self.run_dir / f"plots/{name}{self.suffix}.png"
        return self.out.with_name(f"{self.out.stem}_{name}.png")

    def others(self, drawn: list[Path], names: Sequence[str] = ("samples", "curves")) -> list[Path]:
        """Returns the figures of a report: the `drawn` files, and the figures of the run with these names."""
        found = list(drawn)
        for name in names:
            if not {*self.options.files(self.figure(name))} & {*drawn}:
                path = self.run_dir / f"plots/{name}.png"
                found += [file for kind in FORMATS if (file := path.with_suffix(f".{kind}")).is_file()]
        return found


def curves_of(loaded_run: LoadedRun) -> list[dict[str, Any]]:
    """Returns the rows of the training curves, or for an ensemble of runs the validations of its members.

    Returns no rows if other data than the data of the run are evaluated, because the curves do not show them.
    """
    if not same_data(loaded_run.config["data"], loaded_run.own_data):
        return []
    if loaded_run.members:
        return validations_of({run_dir_of(path).name: run_dir_of(path) for path in loaded_run.members})
    return metrics_of(loaded_run.run_dir)
