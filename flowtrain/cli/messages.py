"""One message for every error: what a command prints of it, and how it exits."""

import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowtrain import distributed
from flowtrain.cli.folders import look_here, own_configs
from flowtrain.errors import FlowtrainError, first_line, out_of_memory
from flowtrain.paths import config_dir, config_groups


def run_command(name: str, command: Callable[[], int]) -> None:
    """Runs a command and exits; an error the user can mend becomes one message on standard error."""
    # Hydra would print its own errors in its own way and exit; raised instead, they pass through here
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    code: int | None
    try:
        if own_configs() is not None:
            look_here()
        code = command()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        code = 130
    except Exception as e:
        code = report(name, e)
        if code is None:
            raise
    sys.exit(code)


def report(name: str, error: Exception) -> int | None:
    """Prints the one message of an error and gives its exit code; None, and nothing is printed, where it has none."""
    if isinstance(error, BrokenPipeError):
        # the reader of our output has gone (as in `floweval ... | head -1`): nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    said = message_of(error)
    if said is None:
        return None
    if distributed.first_to_say(said[0]):
        print(f"{name}: {said[0]}", file=sys.stderr)
    return said[1]


def message_of(error: Exception) -> tuple[str, int] | None:
    """An error in one message, and the exit code: 2 for a mistake, 1 for what went wrong.

    None for what no user can have caused.
    """
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error), 2
    if isinstance(error, FlowtrainError | OSError):
        return str(error), error.exit_code if isinstance(error, FlowtrainError) else 1
    if out_of_memory(error):
        return f"{first_line(error)}: this takes more memory than there is; make it smaller", 1
    return None


def explain(error: Exception) -> str:
    """Hydra's message, and for an unknown key the list of what there is."""
    parts = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    message = " ".join(" ".join(part.split()) for part in parts)
    plugin = re.search(r"Could not (?:find|load) 'hydra/(?:launcher|sweeper)/(joblib|submitit|optuna)", message)
    if plugin:
        return f"hydra/*={plugin[1]} is an extra: pip install 'flowtrain[{plugin[1]}]'"
    unknown = re.search(r"Could not override '([^']+)'", message)
    if unknown is None:
        written = getattr(error, "override", None)
        message = re.sub(r"^In '[^']*': | Config search path:.*$", "", message)
        return f"{written}: {message}" if written else message
    return unknown_key(unknown[1], *_without(unknown[1]))


def _without(key: str) -> tuple[dict[str, Any], str]:
    """The config of the groups that the command line chooses, of a sweep the first that has no such key; and which."""
    chosen = [a.partition("=") for a in sys.argv[1:] if a.partition("=")[0] in config_groups()]
    # of what is written otherwise, as in choice(a,b), the defaults
    plain_words = [(group, names.split(",")) for group, _, names in chosen if re.fullmatch(r"[\w,]+", names)]
    every = [[f"{group}={name}" for name in names] for group, names in plain_words]
    for options in itertools.product(*every):
        config = compose_defaults(options)
        if OmegaConf.select(OmegaConf.create(config), key, default=_without) is _without:
            break
    swept = [option for option, names in zip(options, every, strict=True) if len(names) > 1]
    return config, f"with {', '.join(swept)} " if swept else ""


def unknown_key(key: str, config: Mapping[str, Any], where: str = "") -> str:
    """A message that says how far `key` leads into the config and what there is from there on."""
    node: Any = config
    found: list[str] = []
    for part in key.removeprefix("+").split("."):
        if not isinstance(node, Mapping) or part not in node:
            break
        node = node[part]
        found.append(part)
    have = ", ".join(str(k) for k in node if k not in ("_target_", "name")) if isinstance(node, Mapping) else "no keys"
    return f"{where}there is no key {key}; {'.'.join(found) or 'at the top'} there {'is' if found else 'are'} {have}"


def compose_defaults(overrides: Sequence[str]) -> dict[str, Any]:
    """The plain config that a command line of overrides composes."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return plain(compose("config", [*own_searchpath(), *overrides]))


def own_searchpath() -> list[str]:
    """The override that has Hydra look for configs in the folder of --config-dir too."""
    own = own_configs()
    if own is None:
        return []
    quoted = str(own).replace("\\", r"\\").replace("'", r"\'")
    return [f"hydra.searchpath=['file://{quoted}']"]


def plain(config: DictConfig) -> dict[str, Any]:
    """Interpolations resolved, plain containers."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}
