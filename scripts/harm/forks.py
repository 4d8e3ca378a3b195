"""Commands in forked processes, with limits on memory and time, and the judgement on how they ended."""

import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flowtrain.cli import train
from harm.part import Part, Verdict

# what a process may take beside what this one has, in bytes
MEMORY = 16 * 2**30
# what works or waits for longer has no end; on a machine that is busy with other things, it may wait for long
WORK, WAIT = 100, 900
# the exit code of a process that an exception ended
RAISED = 99


class Outcome(NamedTuple):
    """How a process ended: exit code (negative: a signal's; None: it was not waited for), standard output and error."""

    code: int | None
    out: str
    err: str

    @property
    def words(self) -> str:
        known = {None: f"no end in {WAIT} s", -signal.SIGXCPU: f"no end in {WORK} s of work", RAISED: "an exception"}
        ended = known.get(self.code, f"exit code {self.code}")
        return f"{ended}: {' / '.join(line.strip() for line in self.err.strip().splitlines()[-3:])}"


def forked(function: Callable[[], object], folder: Path) -> Outcome:
    """Calls a function in a process of its own, in that folder."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _call_and_exit(function, folder, out.fileno(), err.fileno())
        code = _exit_code(child)
        for file in (out, err):
            file.seek(0)
        return Outcome(code, out.read().decode(errors="replace"), err.read().decode(errors="replace"))


def _call_and_exit(function: Callable[[], object], folder: Path, out: int, err: int) -> None:
    code = 0
    try:
        os.chdir(folder)
        os.dup2(out, 1)
        os.dup2(err, 2)
        _limit()
        function()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = RAISED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (WORK, WORK + 1))
    held = Path("/proc/self/statm")
    if held.exists():
        limit = int(held.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _exit_code(child: int) -> int | None:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _flowtrain(arguments: Sequence[str]) -> None:
    sys.argv = ["flowtrain", *arguments]
    train.main()


def try_flowtrain(arguments: Sequence[str], folder: Path, part: Part) -> Verdict:
    """Counts what comes of a command; its run directory is kept where that is wrong."""
    run_dir = folder / f"run{part.tried}"
    verdict = judged(forked(partial(_flowtrain, [*arguments, f"hydra.run.dir={run_dir}"]), folder), run_dir)
    if not verdict.wrong:
        shutil.rmtree(run_dir, ignore_errors=True)
    part.count(verdict, f"(cd {folder} && flowtrain {shlex.join(arguments)})")
    return verdict


# the name of a data file in a message
DATA_FILE = re.compile(r"\.(npy|npz|csv|tra|tes|txt)\b")


def judged(outcome: Outcome, run_dir: Path) -> Verdict:
    """Whether a `flowtrain` has trained, or was refused or failed with one message."""
    code, out, err = outcome
    if code not in (0, 1, 2) or "Traceback" in err:
        return Verdict(outcome.words, wrong=True)
    if code:
        log = run_dir / "flowtrain.log"
        logged = log.read_text() if log.exists() else ""
        # warnings about the data are in the log too; a refused run leaves no log, and its warnings name the file
        lines = [line for line in err.splitlines() if line.strip() and line not in logged]
        lines = [line for line in lines if line.startswith("flowtrain: ") or not DATA_FILE.search(line)]
        if len(lines) != 1 or not lines[0].startswith("flowtrain: ") or out:
            return Verdict(f"exit code {code} with {len(lines)} lines: {' / '.join([out, *lines[-3:]])}", wrong=True)
        metrics = run_dir / "metrics.jsonl"
        if code == 2 and metrics.exists() and metrics.stat().st_size:
            return Verdict(f"refused only once it had trained: {lines[0]}", wrong=True)
        return Verdict("refused" if code == 2 else "failed")
    if not (run_dir / "result.json").exists():
        return Verdict("exit code 0, and no result.json", wrong=True)
    nll = json.loads((run_dir / "result.json").read_text())["nll"]
    if nll is None or not math.isfinite(nll):
        return Verdict(f"exit code 0, and the NLL is {nll}", wrong=True)
    return Verdict("trained")
