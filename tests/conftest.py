"""Fixtures of several folders: a seed, float64 as the default so that closed forms are compared tightly, commands."""

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
    """What was imported stays: looking it through for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def work_done_once() -> Iterator[None]:
    """Leaves out work that many tests repeat and that changes no result.

    Each text of YAML is parsed once per process. A command composes its config once: Hydra composes it once more, to
    find `hydra.mode` in it, which only experiments, own configs and the command line set. Hydra also copies its list of
    config sources for each config that it composes, although it only reads them.
    """
    load, get_mode = OmegaConf.load, Hydra.get_mode
    # reading a pickle is several times faster than a copy
    parsed = cache(lambda text: pickle.dumps(load(io.StringIO(text))))

    def load_once(file: Any) -> Any:
        if not isinstance(file, io.TextIOBase):
            return load(file)
        start = file.tell()
        try:
            return pickle.loads(parsed(file.read()))
        except Exception:
            # the message names the file
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
        # the tests do not survive a power failure anyway
        patched.setattr(os, "fsync", lambda fd: None)
        # PyTorch keeps each seed for an absent device, with a traceback
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                patched.setattr(device, "manual_seed_all", lambda seed: None, raising=False)
        yield


@pytest.fixture(autouse=True)
def seeded_float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    # what tests compute is too small to share, and on a busy machine threads wait for each other
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs a command in a fresh working directory: (exit code, standard output, standard error).

    It uses one core. Figures are drawn with few points and saved as blank pictures: rendering them would take most of a
    short run. `full_size` renders them as users get them.
    """
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(process, "cores", lambda: 1)
    # on a busy machine a command may take long enough for a line
    monkeypatch.setattr(status, "EVERY", math.inf)
    monkeypatch.setattr(style, "save", save_blank)
    monkeypatch.setattr(transport_figures, "RESOLUTION", 12)
    for name, few in (("COLUMNS", 2), ("ALONG", 4), ("PARTICLES", 9)):
        monkeypatch.setattr(transport_pictures, name, few)
    monkeypatch.chdir(tmp_path)
    # Hydra answers a broken config with the whole trace when told so; the commands set this themselves
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    # which a sweep sets, and which is set back only if it was there before
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
    # Hydra's --info leaves one that writes to where standard output was
    logging.root.handlers[:] = handlers


@pytest.fixture
def full_size(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders the pictures of `run` as users get them."""
    monkeypatch.setattr(style, "save", SAVE)


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands draw no figures."""
    skip_figures(monkeypatch)


def save_blank(figure: Figure, path: Path, options: PlotOptions = DEFAULT) -> None:
    """Writes a picture of one dot in place of the figure, in each of its files."""
    for file in options.files(path):
        with replacing(file) as f:
            f.write(BLANK)


@pytest.fixture
def float32() -> None:
    """The default of users."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the log says reaches caplog, even once a command has turned propagation off."""
    monkeypatch.setattr(logging.getLogger("flowtrain"), "propagate", True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data, which no test may need."""
    return Path(os.environ.get("FLOWTRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real(real_data: Path) -> Callable[..., list[str]]:
    """Returns the paths of real files, and skips the test where one is missing."""

    def paths_of(*names: str) -> list[str]:
        paths = [real_data / name for name in names]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            pytest.skip(f"real data not found: {', '.join(missing)}; set FLOWTRAIN_DATA")
        return [str(path) for path in paths]

    return paths_of


@pytest.fixture
def trained(run: Run) -> Train:
    """Runs `flowtrain` for a few steps and returns the run directory, whose figures are blank."""

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
    """Runs `floweval` on a run directory and returns the content of eval.json, or of another file of the evaluation."""

    def evaluate(run_dir: str, *arguments: str, name: str = "eval.json") -> dict[str, Any]:
        code, _, err = run("floweval", f"ckpt={run_dir}", *arguments)
        assert code == 0, err
        content: dict[str, Any] = json.loads((Path(run_dir) / name).read_text())
        return content

    return evaluate


@pytest.fixture(scope="session")
def stop_at() -> Callable[[Trainer, int], None]:
    """Makes `fit` end after a given step, as a time limit would, wherever validations fall."""

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
    """Builds the trainer of a small run: data and saved state may be given in place of those of the config."""

    def build(run_dir: Path, *overrides: str, saved: dict[str, Any] | None = None, data: Any = None) -> Trainer:
        small = ["trainer.batch_size=16", "trainer.val_every=4", "trainer.log_every=1", "data.n_val=20"]
        return trainer_of(run_dir, [*small, "data.n_test=20", *overrides], saved, data)

    return build


@pytest.fixture(scope="session")
def rows() -> ReadRows:
    """Reads the rows of metrics.jsonl without the keys that are times."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in lines]

    return read


@pytest.fixture(scope="session")
def saved_run(trainer: MakeTrainer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Copies the run directory of a small RealNVP, trained once to the end, and returns its last checkpoint."""
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
    """Composes the config of a small run on the images in a folder."""

    def compose(root: Path, *overrides: str) -> dict[str, Any]:
        small = ["data=mnist", f"data.root={root}", "data.n_val=10", "trainer.batch_size=8", "trainer.steps=4"]
        small += ["trainer.val_every=2", "trainer.log_every=1", "trainer.plot_every=null", "recipe=none"]
        return composed([*small, *overrides])

    return compose


@pytest.fixture
def only_programs(monkeypatch: pytest.MonkeyPatch) -> OnlyPrograms:
    """Restricts exports to the programs of the given names: tracing all three would take most of a test's time."""
    tasks = export._tasks

    def restrict(*names: str) -> None:
        monkeypatch.setattr(export, "PROGRAMS", names)
        monkeypatch.setattr(export, "_tasks", lambda *given: (task for task in tasks(*given) if task.name in names))

    return restrict
