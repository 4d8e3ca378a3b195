"""`flowtrain`: trains a flow. The last line on standard output is the run directory."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from flowtrain.cli import help
from flowtrain.cli.arguments import split_own, versions
from flowtrain.cli.config_files import plain
from flowtrain.cli.error_messages import report, run_command
from flowtrain.cli.from_run import with_choices_of_from
from flowtrain.cli.late_imports import loading
from flowtrain.cli.overrides import (
    SWEEP,
    check_composition,
    in_order,
    quoted,
    rename_old_keys,
    separated,
    trusted,
    validate_command_line,
    with_default_choices,
    with_name,
)
from flowtrain.training import checkpoint_files
from flowtrain.utils import ranks
from flowtrain.utils.errors import CheckpointError, ConfigError
from flowtrain.utils.files import config_dir


def main() -> None:
    """Runs the command `flowtrain`."""
    run_command("flowtrain", _joined)


def _joined() -> int:
    with ranks.joined():
        return _command()


def _command() -> int:
    if "--version" in sys.argv[1:]:
        if ranks.is_first():
            print(versions())
        return 0
    if sys.argv[1:2] == [help.RUNS]:
        return _list_runs(sys.argv[2:])
    arguments = rename_old_keys(sys.argv[1:])
    if help.asked(arguments):
        if ranks.is_first():
            print(help.help_text(arguments))
        return 0
    arguments = quoted(arguments)
    if any(a.startswith("resume=") and a != "resume=null" for a in arguments):
        return resume(arguments)
    arguments = arguments_of_first_job(with_default_choices(with_name(arguments)))
    validate_command_line(arguments)
    sys.argv[1:] = in_order(with_choices_of_from(arguments))
    check_composition(sys.argv[1:])
    with loading():
        from flowtrain.cli import start_run, sweep_jobs
    directories = start_run.removing_empty_directories()
    with tempfile.TemporaryDirectory() as aside, directories, sweep_jobs.summarized() as summary:
        if not ranks.is_first():
            # Hydra creates a directory on every rank
            mine = [a for a in sys.argv[1:] if not a.lstrip("+").startswith("hydra.run.dir=")]
            sys.argv[1:] = [f"hydra.run.dir={aside}", *mine]
        _start()
    return summary.code


def _list_runs(arguments: Sequence[str]) -> int:
    from flowtrain.cli import list_runs

    if not ranks.is_first():
        return 0
    if help.asked(arguments):
        print(list_runs.USAGE.full())
        return 0
    return list_runs.command(arguments)


def arguments_of_first_job(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of the first job for -m with a flag that only prints, such as --cfg, else all arguments."""
    flags = separated(arguments)[1]
    if not {"-c", "--cfg", "-i", "--info"} & {flag.partition("=")[0] for flag in flags} or not {*SWEEP} & {*flags}:
        return list(arguments)
    return [*help.overrides_of(arguments), *(flag for flag in flags if flag not in SWEEP)]


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _start(config: DictConfig) -> float:
    # a job of a parallel sweep begins here, in another process
    from flowtrain.cli import start_run, sweep_jobs

    run_dir = Path(HydraConfig.get().runtime.output_dir)
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    if multirun and not ranks.launched():
        return sweep_jobs.job(config, run_dir)
    try:
        if multirun:
            raise ConfigError("each job of a sweep runs in one process; leave out torchrun or -m")
        run_dir, again = restarted_run_dir(run_dir)
        if again:
            best, code = start_run.resume_run(run_dir, trusted(plain(config)["trust"]))
        else:
            best, code = start_run.start_run(config, run_dir)
    except Exception as e:
        failed = report("flowtrain", e)
        if failed is None:
            raise
        # Hydra would print a heading above the message of an exception
        raise SystemExit(failed) from e
    if ranks.is_first():
        print(run_dir)
    if code:
        raise SystemExit(code)
    return best


def restarted_run_dir(run_dir: Path) -> tuple[Path, bool]:
    """Returns the run directory for all ranks, and whether an earlier attempt of torchrun left a checkpoint."""
    from flowtrain.cli.start_run import record_directory

    before = ranks.saved_run_dir()
    if before is not None and ranks.is_first():
        if before != run_dir and not any(run_dir.iterdir()):
            run_dir.rmdir()
        run_dir = before
        record_directory(run_dir)
    return ranks.broadcast_object((run_dir, before is not None and checkpoint_files.has_checkpoint(run_dir)))


def resume(arguments: Sequence[str]) -> int:
    """Continues the run in a directory from its last checkpoint. Other arguments change its config."""
    own, rest = split_own(arguments, {"resume": None, "trust": []})
    if not own["resume"]:
        raise ConfigError("resume needs a run directory: flowtrain resume=RUN_DIR")
    run_dir = Path(str(own["resume"])).absolute()
    if run_dir.is_file():
        raise CheckpointError(f"resume={run_dir} is a file; give its run directory")
    if not run_dir.is_dir():
        raise CheckpointError(f"resume={run_dir}: there is no such run directory")
    with loading():
        from flowtrain.cli.start_run import resume_run
    code = resume_run(run_dir, trusted(own["trust"]), rest, tuple(own))[1]
    if ranks.is_first():
        print(run_dir)
    return code


if __name__ == "__main__":
    main()
