"""Formats commands to copy, with paths quoted for the shell."""

import shlex
from pathlib import Path


def option(key: str, path: Path | str) -> str:
    """KEY=PATH, quoted for the shell if needed. Our commands take a path without Hydra's quotes.

    Example:
        >>> print(option("ckpt", "runs/a b [1]"), option("ckpt", "runs/1"))
        'ckpt=runs/a b [1]' ckpt=runs/1
    """
    text = str(path)
    # a file named null must not be read as no file, nor a leading ~ as a home directory
    here = "./" if text.lower() == "null" or text.startswith("~") else ""
    return shlex.quote(f"{key}={here}{text}")


def resume_command(run_dir: Path | str) -> str:
    """The command that resumes a run."""
    return f"flowtrain {option('resume', run_dir)}"
