"""`flowtrain`: trains a flow; the last line on standard output is the run directory."""

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from flowtrain.cli import sweep
from flowtrain.cli.common import report, run_command, split_own, trusted
from flowtrain.cli.grammar import check_grammar
from flowtrain.cli.runs import begin, chosen, go_on
from flowtrain.errors import CheckpointError, ConfigError
from flowtrain.paths import config_dir


def main() -> None:
    run_command("flowtrain", _command)


def _command() -> int:
    arguments = sys.argv[1:]
    if any(a.startswith("resume=") and a != "resume=null" for a in arguments):
        return resume(arguments)
    check_grammar(arguments)
    sys.argv[1:] = chosen(arguments)
    with sweep.summarized() as summary:
        _start()
    return summary.code


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _start(config: DictConfig) -> float:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.job(config, run_dir)
    try:
        best, code = begin(config, run_dir)
    except Exception as e:
        failed = report("flowtrain", e)
        if failed is None:
            raise
        # raised, it would reach the terminal under a heading of Hydra's; one message is what we promise
        raise SystemExit(failed) from e
    print(run_dir)
    if code:
        raise SystemExit(code)
    return best


def resume(arguments: Sequence[str]) -> int:
    """Goes on in the run directory, from its last checkpoint; other arguments change its config."""
    own, rest = split_own(arguments, {"resume": None, "trust": []}, "flowtrain resume=RUN_DIR [KEY=VALUE ...]")
    if not own["resume"]:
        raise ConfigError("resume needs a run directory: flowtrain resume=RUN_DIR")
    run_dir = Path(str(own["resume"])).absolute()
    if run_dir.is_file():
        raise CheckpointError(f"resume={run_dir} is a file; give the run directory")
    if not run_dir.is_dir():
        raise CheckpointError(f"resume={run_dir}: there is no such run directory")
    code = go_on(run_dir, trusted(own["trust"]), rest, tuple(own))[1]
    print(run_dir)
    return code


if __name__ == "__main__":
    main()
