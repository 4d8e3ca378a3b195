"""Writes scalars and pictures of a run for TensorBoard. Nothing is sent anywhere.

Records are appended like the rows of metrics.jsonl. torch's SummaryWriter cannot be used: it writes from a thread that
ends with a traceback when the disk is full. Once its queue is full, the next `add_scalar` blocks the run for ever. A
killed process also loses what is still in the queue.
"""

import io
import logging
import os
import re
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from flowtrain.training.metrics import Metrics
from flowtrain.utils import ranks
from flowtrain.utils.arguments import one_of
from flowtrain.utils.errors import ConfigError

log = logging.getLogger("flowtrain")

# what `logger` may list, and what it lists by default
LOGGERS, DEFAULT = ("jsonl", "tensorboard"), ("jsonl",)
# of result.json
RESULT = ("nll", "bits_per_dim", "kl")
# in float32, which scalars are kept in
LARGEST = 3e38


class Board:
    """Writes rows of metrics and pictures into a folder; what cannot be written never fails a run.

    Raises:
        ImportError: tensorboard is not there.
    """

    def __init__(self, folder: Path) -> None:
        # here, because a run without it should not wait for it
        self.events = import_module("tensorboard.compat.proto.event_pb2")
        self.summaries = import_module("tensorboard.compat.proto.summary_pb2")
        self.records = import_module("tensorboard.summary.writer.record_writer")
        self.earlier = sum(1 for _ in folder.glob("events.out.tfevents.*"))
        # TensorBoard reads the files by their names' order, and a clock may go back between two of them. One each time
        # that a run goes on: nothing is read of a file behind a record that a crash has torn
        self.path = folder / f"events.out.tfevents.{self.earlier:06d}"
        self.waiting, self.warned = b"", False

    def follow(self, metrics: Metrics, step: int, plots: Path) -> None:
        """Begins at the run's step, and from there on hears of every row.

        What earlier files have of that step and later ones is taken back, as by then the run may have ended, which it
        will again; the rows and pictures of that step are written once more. Where there are no earlier files, those
        of all steps before are.
        """
        since = step if self.earlier else 0
        self._add(step=since, file_version="brain.Event:2")
        self._purge(since)
        for row in metrics.rows:
            if since <= row["step"]:
                self.write(**row)
        for path in sorted(plots.glob("*.png")):
            drawn = _step_of(path)
            if drawn is not None and since <= drawn <= step:
                self.picture(path, drawn)
        metrics.listeners.append(self)

    def write(self, **row: Any) -> None:
        """A row of metrics.jsonl: its numbers as train/nll, val/nll, train/grad_norm, ..."""
        values = [
            self.summaries.Summary.Value(tag=f"{row.get('split')}/{key}", simple_value=value)
            for key, value in row.items()
            # what is not finite is null in metrics.jsonl
            if key != "step" and isinstance(value, int | float) and abs(value) < LARGEST
        ]
        self._add(step=row["step"], summary=self.summaries.Summary(value=values))

    def back_to(self, step: int) -> None:
        """Takes back what there is of later steps."""
        self._purge(step + 1)

    def picture(self, path: Path, step: int) -> None:
        """A PNG: samples_000100.png, of step 100, as `samples`; samples.png, of a run's end, as `final/samples`."""
        if self.waiting:
            # where rows have to wait, pictures, which are larger, are left out
            return
        try:
            png = path.read_bytes()
        except OSError:
            return
        if len(png) < 24:
            return
        tag = f"final/{path.stem}" if _step_of(path) is None else path.stem.rpartition("_")[0]
        width, height = struct.unpack(">II", png[16:24])
        # as matplotlib writes them
        rgba = 4
        image = self.summaries.Summary.Image(width=width, height=height, colorspace=rgba, encoded_image_string=png)
        self._add(step=step, summary=self.summaries.Summary(value=[self.summaries.Summary.Value(tag=tag, image=image)]))

    def end(self, result: Mapping[str, Any], drawn: Iterable[Path], step: int) -> None:
        """Of the result.json of a run that ends at a step, the test set's numbers, and the pictures drawn with it."""
        self.write(step=step, split="test", **{key: result[key] for key in RESULT})
        for path in drawn:
            self.picture(path, step)

    def _purge(self, step: int) -> None:
        """What was written before, of this step and later ones, is not shown."""
        self._add(step=step, session_log=self.events.SessionLog(status=self.events.SessionLog.START))

    def _add(self, **event: Any) -> None:
        """Appends an event; what cannot be written, as on a full disk, is tried again with the next one."""
        record = io.BytesIO()
        self.records.RecordWriter(record).write(self.events.Event(wall_time=time.time(), **event).SerializeToString())
        self.waiting += record.getvalue()
        size = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as f:
                size = f.tell()
                f.write(self.waiting)
        except OSError as e:
            if not self.warned:
                log.warning("%s cannot be written (%s): TensorBoard shows what is missing once it can", self.path, e)
            self.warned = True
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)
            return
        self.waiting = b""


def board(logger: Any, folder: Path) -> Board | None:
    """What `logger` asks for besides metrics.jsonl, on the rank that writes.

    Raises:
        ConfigError: it is no list of loggers with jsonl among them, or tensorboard is not installed.
    """
    if not isinstance(logger, list | tuple):
        raise ConfigError(f"logger={logger}: give a list of {', '.join(LOGGERS)}, as in logger=[{','.join(LOGGERS)}]")
    names = [one_of(f"logger[{i}]", name, LOGGERS) for i, name in enumerate(logger)]
    if "jsonl" not in names:
        raise ConfigError(
            f"logger=[{','.join(names)}]: a run goes on and draws its curves from metrics.jsonl; give "
            f"logger=[{','.join(['jsonl', *names])}]"
        )
    if "tensorboard" not in names:
        return None
    try:
        made = Board(folder)
    except ImportError as e:
        raise ConfigError(
            f"logger=[{','.join(names)}] needs tensorboard (pip install 'flowtrain[tensorboard]'), which cannot be "
            f"imported here ({e}); or take logger=[jsonl]"
        ) from e
    return made if ranks.is_first() else None


def _step_of(path: Path) -> int | None:
    """The step in the name of a picture, None of one of a run's end."""
    found = re.search(r"_(\d{6,})$", path.stem)
    return None if found is None else int(found[1])
