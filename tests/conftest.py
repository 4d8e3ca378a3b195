"""Fixtures for several folders: a fixed seed, float64 by default for tight comparisons, and runners of the commands."""

import gc
import io
import json
import logging
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from helpers import COMMANDS, Compose, Evaluate, MakeTrainer, OnlyPrograms, ReadRows, Run, Train
from helpers.figures import skip_figures
from helpers.processes import composed, trainer_of
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.hydra import Hydra
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from flowtrain import export
from flowtrain.cli.config_files import split_config_dir
from flowtrain.plotting import style, transport_figures, transport_pictures
from flowtrain.plotting.options import DEFAULT, PlotOptions
from flowtrain.training.trainer import Trainer
from flowtrain.utils import process, status
from flowtrain.utils.files import replacing

matplotlib.use("Agg")
SAVE = style.save


def blank() -> bytes:
    """A PNG of one white dot."""
    content = io.BytesIO()
    Image.new("RGBA", (1, 1), "white").save(content, "PNG")
    return content.getvalue()


BLANK = blank()


def pytest_collection_finish() -> None:
    """Excludes imported objects from garbage collection, where scanning them repeatedly took a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def work_done_once() -> Iterator[None]:
    """Skips work that many tests repeat and that changes no result.

    Each YAML text is parsed once per process. Hydra composes a command's config a second time to look up `hydra.mode`.
    Only experiments, user configs and the command line can set `hydra.mode`, so the second composition is skipped when
    none of them is used. Hydra also copies its list of config sources for each config, although it only reads the list.
    """
    load, get_mode = OmegaConf.load, Hydra.get_mode
    # unpickling is several times faster than a deep copy
    parsed = cache(lambda text: pickle.dumps(load(io.StringIO(text))))

    def load_once(file: Any) -> Any:
        if not isinstance(file, io.TextIOBase):
            return load(file)
        start = file.tell()
        try:
            return pickle.loads(parsed(file.read()))
        except Exception:
            # an error must name the file, which the cached parser does not know
            file.seek(start)
            return load(file)

    def without_copy(self: CachingConfigRepository, delegate: IConfigRepository) -> None:
        self.delegate, self.cache = delegate, {}

    def mode_where_set(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        for argument in overrides:
            if "experiment" in argument or ("hydra" in argument and ".dir=" not in argument):
                return get_mode(self, config_name, overrides)
        return get_mode(self, config_name, overrides) if split_config_dir(sys.argv[1:])[0] else None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(OmegaConf, "load", staticmethod(load_once))
        patched.setattr(Hydra, "get_mode", mode_where_set)
        patched.setattr(CachingConfigRepository, "__init__", without_copy)
        # tests need no durability after a power failure
        patched.setattr(os, "fsync", lambda fd: None)
        # for an absent device, PyTorch stores each seed together with a traceback
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                patched.setattr(device, "manual_seed_all", lambda seed: None, raising=False)
        yield


@pytest.fixture(autouse=True)
def seeded_float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    # the tensors are too small for several threads, and on a busy machine threads wait for each other
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Returns a function that runs a command in a fresh directory and returns (exit code, stdout, stderr).

    The command uses one core. Figures are drawn with few points and saved as blank pictures, because rendering them
    would take most of a short run. Use `full_size` for the real figures.
    """
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(process, "cores", lambda: 1)
    # on a busy machine a slow command would otherwise print a status line
    monkeypatch.setattr(status, "EVERY", math.inf)
    monkeypatch.setattr(style, "save", save_blank)
    monkeypatch.setattr(transport_figures, "RESOLUTION", 12)
    for name, few in (("PANEL_MOMENTS", 2), ("PATH_MOMENTS", 4), ("PARTICLES", 9)):
        monkeypatch.setattr(transport_pictures, name, few)
    monkeypatch.chdir(tmp_path)
    # with HYDRA_FULL_ERROR set, Hydra prints a full traceback for a broken config. The commands set this variable
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    # sweeps set this variable, and monkeypatch restores only variables that it has seen
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.delenv("TQDM_DISABLE")
    handlers = list(logging.root.handlers)

    def call(command: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            COMMANDS[command]()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    yield call
    # Hydra's --info leaves a handler that writes to the replaced stdout
    logging.root.handlers[:] = handlers


@pytest.fixture
def full_size(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `run` save its figures as users get them."""
    monkeypatch.setattr(style, "save", SAVE)


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes commands draw no figures."""
    skip_figures(monkeypatch)


def save_blank(figure: Figure, path: Path, options: PlotOptions = DEFAULT) -> None:
    """Saves a picture of one dot in place of the figure, in each format."""
    for file in options.files(path):
        with replacing(file) as f:
            f.write(BLANK)


@pytest.fixture
def float32() -> None:
    """Sets the default dtype of users, float32."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def propagate_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets caplog receive log records even after a command has turned off propagation."""
    monkeypatch.setattr(logging.getLogger("flowtrain"), "propagate", True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Returns the folder of the real data sets. No test may require it."""
    return Path(os.environ.get("FLOWTRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real(real_data: Path) -> Callable[..., list[str]]:
    """Returns a function that finds files of the real data, and skips the test if one is missing."""

    def paths_of(*names: str) -> list[str]:
        paths = [real_data / name for name in names]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            pytest.skip(f"real data not found: {', '.join(missing)}; set FLOWTRAIN_DATA")
        return [str(path) for path in paths]

    return paths_of


@pytest.fixture
def trained(run: Run) -> Train:
    """Returns a function that runs `flowtrain` for a few steps and returns the run directory, with blank figures."""

    def train(*arguments: str) -> str:
        few = ["model=affine", "trainer.steps=4", "trainer.batch_size=64", "trainer.plot_every=null"]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(style, "save", save_blank)
            code, out, err = run("flowtrain", *few, *arguments)
        assert code == 0, err
        return str(Path(out.splitlines()[-1]).absolute())

    return train


@pytest.fixture
def evaluated(run: Run) -> Evaluate:
    """Returns a function that runs `floweval` on a run directory and returns eval.json, or the named JSON file."""

    def evaluate(run_dir: str, *arguments: str, name: str = "eval.json") -> dict[str, Any]:
        code, _, err = run("floweval", f"ckpt={run_dir}", *arguments)
        assert code == 0, err
        content: dict[str, Any] = json.loads((Path(run_dir) / name).read_text())
        return content

    return evaluate


@pytest.fixture(scope="session")
def stop_at() -> Callable[[Trainer, int], None]:
    """Returns a function that makes `fit` end after a given step, like a time limit, independently of validations."""

    def stop(trainer: Trainer, step: int) -> None:
        take = trainer.train_step

        def train_step() -> dict[str, Any]:
            if trainer.step == step - 1:
                trainer.stopped_by = "the test"
            return take()

        trainer.train_step = train_step  # type: ignore[method-assign]

    return stop


@pytest.fixture(scope="session")
def trainer() -> MakeTrainer:
    """Returns a function that builds the trainer of a small run. `data` and `saved` replace what the config gives."""

    def build(run_dir: Path, *overrides: str, saved: dict[str, Any] | None = None, data: Any = None) -> Trainer:
        small = ["trainer.batch_size=16", "trainer.val_every=4", "trainer.log_every=1", "data.n_val=20"]
        return trainer_of(run_dir, [*small, "data.n_test=20", *overrides], saved, data)

    return build


@pytest.fixture(scope="session")
def rows() -> ReadRows:
    """Returns a function that reads the rows of metrics.jsonl without the timings."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in lines]

    return read


@pytest.fixture(scope="session")
def saved_run(trainer: MakeTrainer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that copies the run directory of a trained small RealNVP and returns its last checkpoint.

    The model is trained once per session for each combination of overrides.
    """
    done: dict[tuple[Any, ...], Path] = {}

    def copied(run_dir: Path, *overrides: str) -> Path:
        key = (torch.get_default_dtype(), *overrides)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("saved")
            keys = ["model=realnvp", "model.layers=2", "model.hidden=[8]", "trainer.steps=8", *overrides]
            trainer(done[key], *keys).fit()
        shutil.copytree(done[key], run_dir, dirs_exist_ok=True)
        return run_dir / "checkpoints/last.pt"

    return copied


@pytest.fixture(scope="session")
def image_config() -> Compose:
    """Returns a function that composes the config of a small run on the images in a folder."""

    def compose(root: Path, *overrides: str) -> dict[str, Any]:
        small = ["data=mnist", f"data.root={root}", "data.n_val=10", "trainer.batch_size=8", "trainer.steps=4"]
        small += ["trainer.val_every=2", "trainer.log_every=1", "trainer.plot_every=null", "recipe=none"]
        return composed([*small, *overrides])

    return compose


@pytest.fixture
def only_programs(monkeypatch: pytest.MonkeyPatch) -> OnlyPrograms:
    """Returns a function that restricts exports to the named programs, because tracing all three is slow."""
    tasks = export._tasks

    def restrict(*names: str) -> None:
        monkeypatch.setattr(export, "PROGRAMS", names)
        monkeypatch.setattr(export, "_tasks", lambda *given: (task for task in tasks(*given) if task.name in names))

    return restrict
