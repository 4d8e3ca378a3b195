"""Commands in forked processes with limits on memory and time, and verdicts on their results."""

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

# memory that a process may use beyond the memory of this process, in bytes
MEMORY = 16 * 2**30
# limits of CPU time and of elapsed time in seconds; on a busy machine, a process may have to wait
WORK, WAIT = 100, 900
# the exit code after an exception
RAISED = 99


class Outcome(NamedTuple):
    """The end of a process: exit code (negative for a signal, None after a timeout), stdout and stderr."""

    code: int | None
    out: str
    err: str

    @property
    def words(self) -> str:
        known = {None: f"no end in {WAIT} s", -signal.SIGXCPU: f"no end in {WORK} CPU seconds", RAISED: "an exception"}
        ended = known.get(self.code, f"exit code {self.code}")
        return f"{ended}: {' / '.join(line.strip() for line in self.err.strip().splitlines()[-3:])}"


def forked(function: Callable[[], object], folder: Path) -> Outcome:
    """Calls a function in a forked process, in the folder."""
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
    """Runs a command and counts its result. The run directory is kept if the result is wrong."""
    run_dir = folder / f"run{part.tried}"
    verdict = judge(forked(partial(_flowtrain, [*arguments, f"hydra.run.dir={run_dir}"]), folder), run_dir)
    if not verdict.wrong:
        shutil.rmtree(run_dir, ignore_errors=True)
    part.count(verdict, f"(cd {folder} && flowtrain {shlex.join(arguments)})")
    return verdict


# finds the name of a data file in a message
DATA_FILE = re.compile(r"\.(npy|npz|csv|tra|tes|txt)\b")


def judge(outcome: Outcome, run_dir: Path) -> Verdict:
    """Returns whether a `flowtrain` command has trained, or was refused or failed with one message."""
    code, out, err = outcome
    if code not in (0, 1, 2) or "Traceback" in err:
        return Verdict(outcome.words, wrong=True)
    if code:
        log = run_dir / "flowtrain.log"
        logged = log.read_text() if log.exists() else ""
        # ignore warnings about the data: they are in the log, or, without a log after a refusal, name the data file
        lines = [line for line in err.splitlines() if line.strip() and line not in logged]
        lines = [line for line in lines if line.startswith("flowtrain: ") or not DATA_FILE.search(line)]
        if len(lines) != 1 or not lines[0].startswith("flowtrain: ") or out:
            return Verdict(f"exit code {code} with {len(lines)} lines: {' / '.join([out, *lines[-3:]])}", wrong=True)
        metrics = run_dir / "metrics.jsonl"
        if code == 2 and metrics.exists() and metrics.stat().st_size:
            return Verdict(f"refused after training had started: {lines[0]}", wrong=True)
        return Verdict("refused" if code == 2 else "failed")
    if not (run_dir / "result.json").exists():
        return Verdict("exit code 0, but no result.json", wrong=True)
    nll = json.loads((run_dir / "result.json").read_text())["nll"]
    if nll is None or not math.isfinite(nll):
        return Verdict(f"exit code 0, but the NLL is {nll}", wrong=True)
    return Verdict("trained")
