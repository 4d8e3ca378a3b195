"""Commands as text to copy: paths with blanks, brackets or quotes survive the shell."""

import shlex
from pathlib import Path


def option(key: str, path: Path | str) -> str:
    """KEY=PATH, quoted for the shell where it needs that. The commands take a path as it is, without Hydra's quotes.

    Example:
        >>> print(option("ckpt", "runs/a b [1]"), option("ckpt", "runs/1"))
        'ckpt=runs/a b [1]' ckpt=runs/1
    """
    text = str(path)
    # a file of this name here, not no file or somebody's home
    here = "./" if text.lower() == "null" or text.startswith("~") else ""
    return shlex.quote(f"{key}={here}{text}")


def resume_command(run_dir: Path | str) -> str:
    """The command that resumes a run."""
    return f"flowtrain {option('resume', run_dir)}"
