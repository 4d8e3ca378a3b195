"""flowtrain runs on every system that runs torch: the commands work without features that only some systems have."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain.training import checkpoint
from flowtrain.utils import arguments, files, process

# This script runs in a new process. The script removes the modules and names that Windows or other systems lack, and
# imports flowtrain. It imports filelock again, because torch has already imported it. To save time, it runs all
# commands.
WITHOUT = """
import os, pathlib, signal, sys, time, types, warnings
import matplotlib.pyplot, numpy, torch

fork, run = os.fork, sys.argv[1]
for name in ("sched_getaffinity", "sched_setaffinity", "sysconf", "getuid", "geteuid", "getloadavg", "pread", "preadv",
             "pwrite", "pwritev", "link", "sync", "fork", "statvfs", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM", "SIGPIPE", "pthread_sigmask"):
    delattr(signal, name)
gone = ("fcntl", "resource", "pwd", "grp", "termios", "posix_ipc")
for name in [n for n in sys.modules if n in gone or n.partition(".")[0] == "filelock"]:
    del sys.modules[name]


class Hook:
    def find_spec(self, name, path=None, target=None):
        if name in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hook())
warnings.filterwarnings("ignore", "only soft file lock")

import filelock
from flowtrain.utils import ranks

# a torch built without torch.distributed has only is_available
ranks.dist = types.SimpleNamespace(is_available=lambda: False)
from flowtrain.cli import evaluate, sample, train
from flowtrain.runs.run_directory import InUseError, holding
from flowtrain.utils.process import STOPPING

assert STOPPING == (signal.SIGINT, signal.SIGTERM), STOPPING
assert "fcntl" not in sys.modules and filelock.FileLock is filelock.SoftFileLock


def command(main, *arguments):
    sys.argv = ["flowtrain", *arguments]
    try:
        main()
    except SystemExit as e:
        assert not e.code, (arguments, e.code)


def hold_and(end):
        # start a process that locks the run directory and ends without releasing it
    ready, told = os.pipe()
    child = fork()
    if not child:
        taken = holding(pathlib.Path(run))
        taken.__enter__()
        os.write(told, b"x")
        end()
        os._exit(9)
    os.read(ready, 1)
    return child


child = hold_and(lambda: time.sleep(60))
try:
    with holding(pathlib.Path(run)):
        raise AssertionError("two processes hold one directory")
except InUseError as e:
    assert f"process {child} on" in str(e), e
os.kill(child, 9)
os.waitpid(child, 0)
# its leftover lock file does not block the next run
assert pathlib.Path(run, ".lock").exists()

keys = ["model=realnvp", "recipe=none", "model.layers=2", "model.hidden=[4]", "data=array", "data.path=x.npy",
        "data.memory_map=true", "trainer.steps=4", "trainer.val_every=2", "trainer.batch_size=16"]
command(train.main, *keys, f"hydra.run.dir={run}")
assert not pathlib.Path(run, ".lock").exists()
command(train.main, f"resume={run}", "trainer.steps=6")
command(evaluate.main, f"ckpt={run}", "scores=s.npy")
command(sample.main, f"ckpt={run}", "n=20", "out=samples.npy")
"""


@pytest.mark.slow
def test_commands_run_without_platform_specific_functions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    np.save(tmp_path / "x.npy", torch.randn(80, 3).numpy())
    (tmp_path / "without.py").write_text(WITHOUT)
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "without.py", str(tmp_path / "r")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "r/checkpoints/last.pt")["step"] == 6
    assert (tmp_path / "samples.npy").exists()
    assert (tmp_path / "s.npy").exists()
    assert not [path.name for path in (tmp_path / "r").iterdir() if path.name in (".lock", ".holder")]


def test_core_count_without_affinity_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert process.cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert process.cores() == 1


def test_unknown_memory_size_disables_the_memory_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert arguments.within_memory("trainer.batch_size", 2**30, 2**30) == 2**30


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL])
def test_unflushable_directory_does_not_fail_a_write(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows cannot open directories, and some network file systems cannot flush them."""
    name = "open" if number == errno.EACCES else "fsync"
    real = getattr(os, name)

    def refused(where: Any, *arguments: Any) -> Any:
        folder = Path(where).is_dir() if name == "open" else os.fstat(where).st_mode & 0o040000
        if folder:
            raise OSError(number, os.strerror(number))
        return real(where, *arguments)

    monkeypatch.setattr(os, name, refused)
    with files.replacing(tmp_path / "x", durable=True) as f:
        f.write(b"x")
    assert (tmp_path / "x").read_bytes() == b"x"


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_types_check_on_every_platform(platform: str) -> None:
    """mypy knows which names of os and signal exist on each platform."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--platform", platform, "--config-file", "pyproject.toml"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
