"""What the commands share: one-line errors, and overrides in Hydra's grammar on a saved config."""

import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowtrain import distributed
from flowtrain.build import check_targets, resolve_device, restore, samples_of
from flowtrain.data.base import Samples
from flowtrain.errors import ConfigError, FlowtrainError, first_line, out_of_memory
from flowtrain.flow import Flow
from flowtrain.paths import config_dir, config_groups
from flowtrain.run import prepare_process
from flowtrain.training import checkpoint
from flowtrain.training.tensorboard import DEFAULT


def run_command(name: str, command: Callable[[], int]) -> None:
    """Runs a command and exits; an error the user can mend becomes one message on standard error."""
    # Hydra would print its own errors in its own way and exit; raised instead, they pass through here
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    code: int | None
    try:
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
    every = [[f"{group}={name}" for name in names.split(",")] for group, _, names in chosen]
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
        return plain(compose("config", list(overrides)))


def plain(config: DictConfig) -> dict[str, Any]:
    """Interpolations resolved, plain containers."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def split_own(arguments: Sequence[str], own: Mapping[str, Any], usage: str) -> tuple[dict[str, Any], list[str]]:
    """The command's own keys with their values, and the overrides left over, meant for the saved config.

    Raises:
        ConfigError: an argument that is no override.
        SystemExit: after printing `usage`, when asked for help.
    """
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        print(usage)
        raise SystemExit(0 if arguments else 2)
    bad = [a for a in arguments if "=" not in a]
    if bad:
        raise ConfigError(f"{bad[0]}: arguments look like KEY=VALUE; see --help")
    values, rest = dict(own), []
    for argument, override in zip(arguments, OverridesParser.create().parse_overrides(list(arguments)), strict=True):
        if override.is_sweep_override() and override.key_or_group in own:
            raise ConfigError(f"{override.key_or_group}: several values make a sweep, which only flowtrain -m can run")
        if override.key_or_group in own:
            values[override.key_or_group] = override.value()
        else:
            rest.append(argument)
    return values, rest


def trusted(value: Any) -> list[str]:
    """The packages that `trust` names.

    Raises:
        ConfigError: no names.
    """
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"trust={value}: give names of packages, as in trust=[mypkg]")
    return names


def overridden(
    saved: Mapping[str, Any], overrides: Sequence[str], own: Sequence[str] = (), used: Sequence[str] = ()
) -> dict[str, Any]:
    """A saved config with overrides: GROUP=NAME takes the group anew from the configs, KEY=VALUE sets a key.

    Args:
        own: the command's own keys, for the message.
        used: the keys of the config that the command reads; empty for all. Others are refused, not passed over.

    Raises:
        ConfigError: an unknown or unused key, or another model, which would not fit the weights.
    """
    # an older flowtrain did not have these keys
    solver, logger = saved["solver"], saved.get("logger", list(DEFAULT))
    config = OmegaConf.create({**saved, "solver": {**solver, "steps": solver.get("steps")}, "logger": logger})
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:
        group = override.key_or_group
        top = group.partition(".")[0]
        if override.is_sweep_override():
            raise ConfigError(f"{group}: several values make a sweep, which only flowtrain -m can run; give one")
        if used and top in config and top not in used:
            raise ConfigError(f"{group}: has no use here; give {', '.join(own)}, or keys of {', '.join(used)}")
        if group in config_groups():
            if group in ("model", "experiment", "recipe"):
                raise ConfigError(f"{group}={override.value()}: the checkpoint has its own model; leave it out")
            config[group] = compose_defaults([f"{group}={override.value()}"])[group]
    for override in parsed:
        key = override.key_or_group
        if key in config_groups():
            continue
        if not override.is_add() and OmegaConf.select(config, key, default=overridden) is overridden:
            also = f" (and {', '.join(own)})" if own and "." not in key else ""
            raise ConfigError(unknown_key(key, plain(config)) + also)
        OmegaConf.update(config, key, override.value(), force_add=override.is_add())
        if key in SAME and SAME[key] not in [other.key_or_group for other in parsed]:
            OmegaConf.update(config, SAME[key], None)
    return plain(config)


# two keys for one thing: to set one takes the other back
SAME = {"solver.steps": "solver.step_size", "solver.step_size": "solver.steps"}


# the parts of a saved config that scoring and sampling read, what may be changed of the model, and what may not of data
USED = ("model", "data", "solver", "threads")
MODEL = ("eval_trace", "noise", "noise_samples")
TRAINED = ("data.alpha", "data.standardize")


class Opened(NamedTuple):
    """A checkpoint file, its flow and step, its samples, and its config with the overrides of the command line."""

    path: Path
    flow: Flow
    step: int
    samples: Samples
    config: dict[str, Any]


def open_checkpoint(own: Mapping[str, Any], overrides: Sequence[str]) -> Opened:
    """What the keys `ckpt`, `device` and `trust` and the overrides mean, checked before anything is built.

    Raises:
        ConfigError: no `ckpt`, or an unknown key.
        CheckpointError: missing, damaged, or asking for code that is not trusted.
    """
    if not own["ckpt"]:
        raise ConfigError("ckpt=RUN_DIR_OR_FILE is needed; see --help")
    path = checkpoint.find(Path(str(own["ckpt"])))
    saved = checkpoint.load(path)
    trust = trusted(own["trust"])
    check_targets(saved["config"], trust)
    check_kept(overrides)
    overrides = with_array(saved["config"], overrides)
    config = absolute_paths(overridden(saved["config"], overrides, tuple(own), USED))
    # how the flow is preprocessed belongs to the data it was trained on, whatever it now meets
    trained_on = {**config, "data": saved["config"]["data"]}
    flow = restore({**saved, "config": trained_on}, resolve_device(own["device"]), trust)
    prepare_process(config, flow.event_shape)
    return Opened(path, flow, saved["step"], samples_of(saved), config)


def keys_of(overrides: Sequence[str]) -> set[str]:
    """What KEY=VALUE overrides set."""
    return {a.partition("=")[0] for a in overrides}


def with_array(saved: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """With data=array where only its path was given, and the flow was trained on data that have none."""
    keys = keys_of(overrides)
    if "data.path" in keys and "data" not in keys and "path" not in saved["data"]:
        return ["data=array", *overrides]
    return list(overrides)


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Any]) -> None:
    """Refuses, before any work is done, to write two things to one place, or over what is read.

    Raises:
        ConfigError: such a place, or a directory.
        OSError: a folder that cannot be written.
    """
    taken = {
        Path(os.path.realpath(Path(given).expanduser())) for given in inputs if isinstance(given, str | Path) and given
    }
    for path in outputs:
        real = Path(os.path.realpath(path))
        if real in taken:
            raise ConfigError(f"{path}: this is read here, or written to already; give another name")
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; give the name of a file")
        # a device or a pipe can take more than one
        if not real.exists() or real.is_file():
            taken.add(real)
        folder = next(parent for parent in real.parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a directory: nothing can be written into it")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")


def written_as(key: str, value: Any, ending: str) -> Path | None:
    """The file that an option names, None where it is not given.

    Raises:
        ConfigError: a name that does not end in `ending`.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not value.endswith(ending):
        raise ConfigError(f"{key}={value}: this is written as {ending}; give a name that ends so")
    return Path(value).expanduser()


def check_kept(overrides: Sequence[str]) -> None:
    """Refuses to change what the weights were trained with: they would be scored as those of another density."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key.startswith("model.") and key.removeprefix("model.") not in MODEL:
            free = ", ".join(f"model.{name}" for name in MODEL)
            raise ConfigError(f"{key}: the checkpoint has its own model, of which {free} can be changed; leave it out")
        if key in TRAINED:
            raise ConfigError(f"{key}: the checkpoint keeps what it was trained with; leave it out")


def run_dir_of(path: Path) -> Path:
    """The run directory of a checkpoint file; for one kept elsewhere, the folder it lies in."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Data files by absolute path, so that a checkpoint finds them from any working directory."""
    data = {
        k: str(Path(v).expanduser().absolute()) if isinstance(v, str) and is_path(k) else v
        for k, v in config["data"].items()
    }
    return {**config, "data": data}


def paths_of(data: Mapping[str, Any]) -> list[Any]:
    """The files that a data set is read from."""
    return [value for key, value in data.items() if is_path(key)]


def is_path(key: str) -> bool:
    """Whether a key of the data says where files are."""
    return key in ("path", "root") or key.endswith("_path")
