"""One run from its config to result.json."""

import ctypes
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowtrain import build, distributed, pictures, plots
from flowtrain.checks import whole, within_memory
from flowtrain.data.base import Dataset, Samples
from flowtrain.errors import CheckpointError, ConfigError, UnfinishedError
from flowtrain.evaluation import evaluate
from flowtrain.files import write_json
from flowtrain.flow import Flow
from flowtrain.training import checkpoint, tensorboard
from flowtrain.training.loop import Trainer
from flowtrain.training.signals import SignalReceived, ended_by_signals

log = logging.getLogger("flowtrain")

MOST_THREADS = 1024
# the flow that a run's objective learns from, in its directory
TEACHER = "checkpoints/teacher.pt"


@contextmanager
def messages(path: Path | None = None) -> Iterator[None]:
    """Inside, messages go to standard error, and with the time to a file where one is given; those of rank 0 alone."""
    if not distributed.is_first():
        path = None
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(message)s"))
    handlers: list[logging.Handler] = [console]
    if path is not None:
        file = logging.FileHandler(path)
        # a message that the disk has no room for was on the terminal
        file.handleError = lambda record: None  # type: ignore[method-assign]
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    log.setLevel(logging.INFO if distributed.is_first() else logging.CRITICAL)
    log.propagate = False
    log.handlers[:] = handlers
    try:
        yield
    finally:
        log.handlers.clear()
        for handler in handlers:
            handler.close()


def prepare_process(config: Mapping[str, Any], event_shape: tuple[int, ...]) -> None:
    """Threads and allocator. `threads`: null takes one where matrices are too small to share, else all cores."""
    threads = config.get("threads")
    if threads is None:
        cores = len(os.sched_getaffinity(0)) // distributed.on_this_machine()
        threads = 1 if math.prod(event_shape) <= 16 else max(1, cores)
    if whole("threads", threads) > MOST_THREADS:
        raise ConfigError(f"threads={threads}: give at most {MOST_THREADS}")
    torch.set_num_threads(threads)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets glibc reuse what torch frees on the CPU.

    By default it gives large blocks back at once, and the next tensor of that size waits for fresh zeroed pages, which
    convolutional training steps feel most. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 32 * 2**20)
    mallopt(trim_threshold, 2**31 - 1)


def train(
    config: Mapping[str, Any], run_dir: Path, saved: Mapping[str, Any] | None = None, trust: Sequence[str] = ()
) -> tuple[float, int]:
    """Trains, evaluates the best checkpoint on the test set, writes result.json and the pictures.

    Args:
        config: plain values, resolved.
        saved: the checkpoint to go on from.
        trust: packages besides flowtrain that the run of `from` may build from.

    Returns:
        (best validation NLL in nats, exit code): 128 + the signal's number after a signal, else 0.
    """
    board = tensorboard.board(config["logger"], run_dir / "tensorboard")
    device = distributed.device(build.resolve_device(config["device"]))
    settings = build.build_settings(config)
    data = build.build_data(config)
    if saved is not None:
        check_same("resume", build.samples_of(saved), data.samples)
    within_memory("trainer.batch_size", settings.batch_size, 4 * math.prod(data.event_shape))
    prepare_process(config, data.event_shape)
    taught = teaching(config, run_dir, saved is not None)
    teacher = None
    if taught is not None:
        check_same("from", build.samples_of(taught), data.samples)
        teacher = build.restore(taught, device, trust)
    if saved is not None:
        build.check_sizes(saved, data.samples)
    torch.manual_seed(whole("seed", config["seed"], least=0))
    flow = build.build_flow(config, data.samples).to(device)
    if teacher is not None and saved is None:
        flow.load_state_dict(teacher.state_dict())
    objective = build.build_objective(config, flow, teacher)
    config = {**config, "objective": {**config["objective"], **objective.pinned}}
    title = title_of(config)
    log.info(
        "%s: %d parameters, %s samples, %s, %s",
        title,
        sum(p.numel() for p in flow.parameters()),
        "x".join(map(str, data.event_shape)),
        device,
        run_dir,
    )

    def picture(flow: Flow, step: int, nll: float) -> None:
        bits = flow.bits_per_nat
        reached = f"NLL {nll:.3f}" if bits is None else f"{bits * nll:.3f} bits/dim"
        words = f"{title}, step {step}, validation {reached}"
        path = run_dir / f"plots/samples_{step:06d}.png"
        with pictures.spared(f"of step {step}"):
            pictures.draw(flow, data, path, words)
            if board is not None:
                board.picture(path, step)

    trainer = Trainer(objective, flow, data, settings, run_dir, config, saved, picture, initialize=teacher is None)
    if saved is None and taught is not None and build.takes_teacher(config) and distributed.is_first():
        # now that nothing is left to be refused: with it, the directory holds a run. As it was read: by now, the other
        # run may have gone on
        checkpoint.save(run_dir / TEACHER, taught)
    if board is not None:
        board.follow(trainer.metrics, trainer.step, run_dir / "plots")
    trainer.fit()
    best = float("nan") if trainer.best is None else trainer.best["nll"]
    if trainer.signal is not None:
        log.info("%s at step %d; go on with: flowtrain resume=%s", trainer.stopped_by, trainer.saved_step, run_dir)
        return best, 128 + trainer.signal
    if trainer.stopped_by:
        log.info("stopped at step %d: %s", trainer.step, trainer.stopped_by)
    if not distributed.is_first():
        return best, 0
    try:
        with ended_by_signals():
            # the trainer's config, whose step size may have become smaller
            finish(trainer.config, run_dir, data, device, title, trainer, board)
    except SignalReceived as e:
        log.info("%s during the evaluation; go on with: flowtrain resume=%s", signal.Signals(e.number).name, run_dir)
        return best, 128 + e.number
    except OSError as e:
        raise UnfinishedError(
            f"the run has ended at step {trainer.saved_step} and is saved, but its result could not be written ({e}): "
            f"once it can be, flowtrain resume={run_dir} evaluates it"
        ) from e
    return best, 0


def teaching(config: Mapping[str, Any], run_dir: Path, resumed: bool) -> dict[str, Any] | None:
    """The checkpoint of the run that `from` names: what a new run begins with, and what some objectives learn from.

    Those are resumed with the copy that they kept, whatever becomes of the other run; others no longer need it.

    Raises:
        CheckpointError: it is not to be had.
    """
    if config.get("from") is None or (resumed and not build.takes_teacher(config)):
        return None
    path = run_dir / TEACHER if resumed else checkpoint.find(Path(config["from"]))
    if not path.is_file():
        raise CheckpointError(f"{path} is not there: the run cannot go on without; start a new one, with from=RUN_DIR")
    return checkpoint.load(path)


def check_same(who: str, before: Samples, now: Samples) -> None:
    """Refuses to go on with a run on samples of another kind.

    Raises:
        ConfigError: naming what differs.
    """
    for key in ("event_shape", "discrete", "levels", "alpha", "standardized"):
        old, new = getattr(before, key), getattr(now, key)
        if old != new:
            raise ConfigError(
                f"{who}: the run was trained on samples whose {key} is {old}, and that of the data now is {new}: "
                "leave data.* as it was, but for where its files are"
            )


def title_of(config: Mapping[str, Any]) -> str:
    """Such as "ffjord on moons"; the user's own data go by their file's name."""
    return f"{label(config['model'])} on {data_name(config)}"


def data_name(config: Mapping[str, Any]) -> str:
    """Of a data set; the user's own data go by their file's."""
    path = config["data"].get("path")
    return Path(path).name if path else label(config["data"])


def label(group: Mapping[str, Any]) -> str:
    """The name of a group's choice, or of what it builds."""
    return str(group.get("name") or group["_target_"].rpartition(".")[2])


def finish(
    config: Mapping[str, Any],
    run_dir: Path,
    data: Dataset,
    device: torch.device,
    title: str,
    trainer: Trainer,
    board: tensorboard.Board | None,
) -> None:
    """result.json and the final pictures, from the best checkpoint as it stands on the disk."""

    def place(name: str) -> Path:
        return run_dir / f"plots/{name}.png"

    saved = checkpoint.load(checkpoint.find(run_dir))
    flow = build.restore({**saved, "config": config}, device, trust=_own_packages(config))
    result = evaluate(flow, data, "test", saved["step"])
    best = None if trainer.best is None else trainer.best["nll"]
    rest = {"train_seconds": trainer.seconds, "steps": trainer.step, "val_nll": best}
    write_json(run_dir / "result.json", {**result.to_dict(), **rest})
    drawn = []
    with pictures.spared("curves"):
        plots.draw_curves(place("curves"), rows=trainer.metrics.rows, title=title, entropy=data.entropy)
        drawn.append(place("curves"))
    with pictures.spared("samples"):
        pictures.draw(flow, data, place("samples"), f"{title}, test {result.words}")
        drawn.append(place("samples"))
    drawn += pictures.draw_evaluation(result, title, data_name(config), place)
    drawn += pictures.draw_more(flow, data, place, title)
    if board is not None:
        board.end(result.to_dict(), drawn, trainer.step)
    log.info("%s\ntrained %d steps in %.1f s", result.table(), trainer.step, trainer.seconds)


def _own_packages(config: Mapping[str, Any]) -> list[str]:
    """The packages this run was itself composed from: what it trained with, it may be evaluated with."""
    return [
        str(group["_target_"]).split(".")[0]
        for group in config.values()
        if isinstance(group, dict) and "_target_" in group
    ]
