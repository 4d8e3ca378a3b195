"""Writes scalars and pictures of a run for TensorBoard. Nothing is sent anywhere.

Records are appended like the rows of metrics.jsonl. torch's SummaryWriter is not used, because it writes from a thread
that ends with a traceback when the disk is full. Once its queue is full, the next `add_scalar` blocks the run for ever.
A killed process also loses the records that are still in the queue.
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

# the choices of `logger` and its default
LOGGERS, DEFAULT = ("jsonl", "tensorboard"), ("jsonl",)
# the keys of result.json that are written
RESULT = ("nll", "bits_per_dim", "kl")
# scalars are stored in float32, whose range ends here
LARGEST = 3e38


class Board:
    """Writes rows of metrics and pictures into a folder. A failed write only causes a warning.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        # imported here, because the import takes time, which a run without TensorBoard should not spend
        self.events = import_module("tensorboard.compat.proto.event_pb2")
        self.summaries = import_module("tensorboard.compat.proto.summary_pb2")
        self.records = import_module("tensorboard.summary.writer.record_writer")
        self.earlier = sum(1 for _ in folder.glob("events.out.tfevents.*"))
        # TensorBoard reads the files in the order of their names. The files are numbered, because the clock may be set
        # back. Every command writes a new file, because nothing is read after a record that a crash has truncated
        self.path = folder / f"events.out.tfevents.{self.earlier:06d}"
        self.waiting, self.warned = b"", False

    def follow(self, metrics: Metrics, step: int, plots: Path) -> None:
        """Starts to follow the rows of `metrics` at a step of the run.

        Records in earlier files of this step and later steps are dropped, because an earlier command may have written
        final results at this step. The rows and pictures of that step are then written again. Without earlier files,
        the rows and pictures of all earlier steps are written.
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
        """Writes the numbers in a row of metrics.jsonl as train/nll, val/nll, train/grad_norm and so on."""
        values = [
            self.summaries.Summary.Value(tag=f"{row.get('split')}/{key}", simple_value=value)
            for key, value in row.items()
            # NaN and infinity are left out, as in metrics.jsonl, where they are null
            if key != "step" and isinstance(value, int | float) and abs(value) < LARGEST
        ]
        self._add(step=row["step"], summary=self.summaries.Summary(value=values))

    def back_to(self, step: int) -> None:
        """Drops the records of later steps."""
        self._purge(step + 1)

    def picture(self, path: Path, step: int) -> None:
        """Writes a PNG file. samples_000100.png of step 100 gets the tag `samples`, and samples.png `final/samples`."""
        if self.waiting:
            # the disk is full. Pictures are left out, because they are larger than the waiting rows
            return
        try:
            png = path.read_bytes()
        except OSError:
            return
        if len(png) < 24:
            return
        tag = f"final/{path.stem}" if _step_of(path) is None else path.stem.rpartition("_")[0]
        width, height = struct.unpack(">II", png[16:24])
        # matplotlib writes RGBA
        rgba = 4
        image = self.summaries.Summary.Image(width=width, height=height, colorspace=rgba, encoded_image_string=png)
        self._add(step=step, summary=self.summaries.Summary(value=[self.summaries.Summary.Value(tag=tag, image=image)]))

    def end(self, result: Mapping[str, Any], drawn: Iterable[Path], step: int) -> None:
        """Writes the results on the test set and the last pictures of a run that ends at a step."""
        self.write(step=step, split="test", **{key: result[key] for key in RESULT})
        for path in drawn:
            self.picture(path, step)

    def _purge(self, step: int) -> None:
        """Makes TensorBoard drop earlier records of this step and later steps."""
        self._add(step=step, session_log=self.events.SessionLog(status=self.events.SessionLog.START))

    def _add(self, **event: Any) -> None:
        """Appends an event. If the disk is full, the event is written together with the next event."""
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
                log.warning(
                    "%s cannot be written (%s). The records are kept in memory until they can be written", self.path, e
                )
            self.warned = True
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)
            return
        self.waiting = b""


def board(logger: Any, folder: Path) -> Board | None:
    """Returns the TensorBoard writer if `logger` lists it, on rank 0 only; else None.

    Raises:
        ConfigError: `logger` is not a list of loggers that includes jsonl, or tensorboard is not installed.
    """
    if not isinstance(logger, list | tuple):
        raise ConfigError(f"logger={logger}: give a list of {', '.join(LOGGERS)}, as in logger=[{','.join(LOGGERS)}]")
    names = [one_of(f"logger[{i}]", name, LOGGERS) for i, name in enumerate(logger)]
    if "jsonl" not in names:
        raise ConfigError(
            f"logger=[{','.join(names)}]: metrics.jsonl is needed to resume a run and to plot its curves; give "
            f"logger=[{','.join(['jsonl', *names])}]"
        )
    if "tensorboard" not in names:
        return None
    try:
        made = Board(folder)
    except ImportError as e:
        raise ConfigError(
            f"logger=[{','.join(names)}] needs tensorboard, which cannot be imported ({e}): install it (pip install "
            "'flowtrain[tensorboard]') or give logger=[jsonl]"
        ) from e
    return made if ranks.is_first() else None


def _step_of(path: Path) -> int | None:
    """Returns the step in the name of a picture; None for the pictures at the end of a run."""
    found = re.search(r"_(\d{6,})$", path.stem)
    return None if found is None else int(found[1])
