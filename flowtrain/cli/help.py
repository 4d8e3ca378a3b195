"""`flowtrain --help`: what the config files and their comments say, for what a command line chooses."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from omegaconf import OmegaConf

from flowtrain.cli.config_files import (
    CommentedConfig,
    config_dirs,
    options,
    own_searchpath,
    plain,
    read,
    split_config_dir,
)
from flowtrain.cli.overrides import SWEEP, VALUED, quoted, validate_command_line, with_default_choices
from flowtrain.cli.start_run import check_known_keys, with_choices_of_from
from flowtrain.runs.compose import applied_recipes
from flowtrain.utils.arguments import hint
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import config_dir
from flowtrain.utils.formatting import flattened, shown

WIDTH, COLUMN = 110, 36
# the groups as one thinks of a run
GROUPS = ("model", "data", "objective", "regularizer", "solver", "trainer", "recipe", "experiment")

# flags that take the next argument
TAKING = (*VALUED, "-i", "--info")

Row = tuple[str, str]

USES: list[Row] = [
    ("flowtrain", "FFJORD on two moons, the defaults"),
    ("flowtrain model=realnvp data=mnist", "other choices; scripts/download_mnist.py fetches MNIST"),
    ("flowtrain data=array data.path=FILE", "your own .npy, .npz or .csv, one row a sample"),
    ("flowtrain -m solver.rtol=1e-3,1e-5", "a sweep"),
    ("flowtrain resume=RUN_DIR", "goes on exactly where a run stopped"),
    ("flowtrain from=RUN_DIR", "a new run with the model, data and weights of another"),
    ("floweval RUN_DIR", "the test NLL of a run, see floweval --help"),
    ("flowsample RUN_DIR n=10000", "samples of a run, see flowsample --help"),
    ("flowexport RUN_DIR out=flow.onnx", "programs that run without flowtrain, see flowexport --help"),
]
FLAGS: list[Row] = [
    ("-h, --help", "this, for what the command line chooses: flowtrain model=glow data=mnist --help"),
    ("-h TOPIC", "the help on one group, choice or key: flowtrain --help trainer"),
    ("--version", "the versions of flowtrain, torch and Python"),
    (
        "-m, --multirun",
        "a sweep: KEY=A,B or GROUP=A,B makes a run of each, where hydra/launcher says",
    ),
    ("--cfg job", "the config that the command line composes, and no run; -p trainer with it: a part"),
    ("--cfg hydra", "Hydra's own part of it"),
    ("--info defaults-tree", "which file chooses which, and no run"),
    ("--info defaults", "the files in the order in which they are merged: the last has the last word"),
    ("--info searchpath", "the folders that they are looked for in"),
    ("--info", "all of that, the plugins and the config"),
    ("--config-dir DIR", "your own configs too, DIR/model/mine.yaml for model=mine; see README, Extending"),
    ("--hydra-help", "the flags and the groups of Hydra itself"),
]
COMPLETION: list[Row] = [
    ('eval "$(flowtrain -sc install=bash)"', "bash; for good, in ~/.bashrc"),
    ('eval "$(flowtrain -sc install=bash)"', "zsh, after autoload -Uz bashcompinit && bashcompinit"),
    ("flowtrain -sc install=fish | source", "fish"),
]
CODES: list[Row] = [
    ("0", "the run has ended, also by early stopping or trainer.time_limit"),
    ("1", "something went wrong on the way: a solve, a full disk, a job of a sweep"),
    ("2", "a mistake: one message on standard error says which, and nothing was run"),
    ("128 + n", "stopped by signal n, 130 by Ctrl-C; the run is saved, and resume=RUN_DIR goes on"),
]
OUTPUT = (
    "The last line of standard output is the run directory, of a sweep the directory of all its runs. Messages and "
    "progress go to standard error, and to RUN_DIR/flowtrain.log."
)


def asked(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for help."""
    return any(a in ("-h", "--help") for a in arguments)


def help_text(arguments: Sequence[str]) -> str:
    """The help for a command line.

    Raises:
        ConfigError, HydraException: a mistake in it.
    """
    about = topics(arguments)
    arguments = with_default_choices(quoted([argument for argument in arguments if argument not in about]))
    validate_command_line(arguments)
    if about:
        return topic_text(about, overrides=overrides_of(with_choices_of_from(arguments)))
    run, hydra = composed(overrides_of(with_choices_of_from(arguments)))
    choices = hydra["runtime"]["choices"]
    blocks = [
        ["flowtrain: train, evaluate and look at normalizing flows"],
        ["  flowtrain [GROUP=NAME ...] [KEY=VALUE ...] [FLAG ...]"],
        table(USES, column=42),
        ["Recipe", *recipe_lines(run, choices)],
        ["Groups (GROUP=NAME chooses; * marks what this command line chooses)"],
        *(group_lines(group, [choices.get(group), choices.get(f"{group}@_global_")]) for group in GROUPS),
        ["Keys (KEY=VALUE sets one; the values are those that this command line composes)"],
        *key_lines(run, hydra, choices),
        ["Flags"],
        table(FLAGS, column=26),
        ["Tab completion, of groups, choices and keys"],
        table(COMPLETION, column=42),
        ["Output and exit codes"],
        textwrap.wrap(OUTPUT, WIDTH, initial_indent="  ", subsequent_indent="  "),
        table(CODES, column=12),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def topics(arguments: Sequence[str]) -> list[str]:
    """The words beside --help that are neither flags nor overrides, as `trainer` in `flowtrain --help trainer`."""
    rest = split_config_dir(arguments)[1]
    found = zip(["", *rest], rest, strict=False)
    return [a for before, a in found if a.strip() and "=" not in a and a[0] not in "-~" and before not in TAKING]


def topic_text(about: Sequence[str], others: Iterable[str] = (), overrides: Sequence[str] = ()) -> str:
    """The help on groups, their choices and keys.

    Args:
        others: further known topics, for the suggestions of the message.
        overrides: overrides on the command line, which select choices and set keys.

    Raises:
        ConfigError: an unknown topic.
    """
    run, hydra = composed(overrides)
    choices = hydra["runtime"]["choices"]
    return "\n\n".join("\n".join(_on(topic, run, choices, others)) for topic in about)


def _on(topic: str, run: Mapping[str, Any], choices: Mapping[str, Any], others: Iterable[str]) -> list[str]:
    """The lines of the help on one topic."""
    if topic in GROUPS:
        lines = group_lines(topic, [choices.get(topic), choices.get(f"{topic}@_global_")])
        return [*lines, *(_keys_of(topic, str(choices[topic]), run) if topic in run else [])]
    values, said = flattened(run), dict(main_file().keys)
    for group in GROUPS:
        said |= meanings(group, str(choices[group])) if group in run else {}
    keys = {key: value for key, value in values.items() if key == topic or key.startswith(f"{topic}.")}
    if keys:
        return key_table_of(keys, said)
    chosen_by = [group for group in GROUPS if topic in options(group)]
    if chosen_by:
        rows = [(f"{group}={topic}", read(group, topic).sentence) for group in chosen_by]
        group = chosen_by[0]
        shown_keys = [] if group not in run else _keys_of(group, topic, composed([f"{group}={topic}"])[0])
        return [*table(rows, column=30), *shown_keys]
    names = [*GROUPS, *others, *values, *(name for group in GROUPS for name in options(group))]
    rest = f"topics are the groups {', '.join(GROUPS)}, their choices, and keys such as trainer.lr"
    raise ConfigError(f"{topic}: unknown help topic; {hint(topic, names, rest)}")


def _keys_of(group: str, name: str, run: Mapping[str, Any]) -> list[str]:
    return [f"  {group}={name}", *key_table({group: run[group]}, meanings(group, name))]


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """The overrides among the arguments of a command line, of a sweep those of its first run."""
    rest = split_config_dir(arguments)[1]
    words = [a for before, a in zip(["", *rest], rest, strict=False) if not a.startswith("-") and before not in TAKING]
    if not {*SWEEP} & {*rest}:
        return words
    return [word for override in OverridesParser.create().parse_overrides(words) for word in first_of(override)]


def first_of(override: Override) -> list[str]:
    """An override with the first of its values; nothing where there is no first, as in an interval."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    value, key = override.value(), override.get_key_element()
    if isinstance(value, Glob):
        return [f"{key}={name}" for name in value.filter(list(options(override.key_or_group)))[:1]]
    if not override.is_discrete_sweep():
        return []
    return [f"{key}={next(override.sweep_string_iterator())}"]


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a run, and Hydra's own part as it is written."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        whole = compose("config", [*own_searchpath(), *overrides], return_hydra_config=True)
    hydra = OmegaConf.to_container(whole.hydra)
    run = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    return check_known_keys(plain(run)), cast(dict[str, Any], hydra)


def recipe_lines(run: Mapping[str, Any], choices: Mapping[str, Any]) -> list[str]:
    """What a recipe is, and what the recipes of this command line set."""
    values = flattened(run)
    said = (
        "A recipe is a set of key values that suit a model with a data set or with an objective. It applies "
        "automatically. recipe=none turns off the recipe of the data set, and KEY=VALUE overrides one key. "
    )
    found = applied_recipes(choices, run, config_dirs())
    if not found:
        said += f"None applies to model={run['model'].get('name')} data={run['data'].get('name')}."
    for name, keys in found.items():
        said += f"Here {name} applies and sets " + " ".join(f"{key}={shown(values[key])}" for key in keys) + ". "
    return textwrap.wrap(said, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def group_lines(group: str, names: Sequence[str | None]) -> list[str]:
    """A group, what it is for, and its choices, those in `names` marked."""
    rows = [(f"{'*' if name in names else ' '} {name}", read(group, name).sentence) for name in options(group)]
    return [*table([(group, main_file().groups[group])], column=30), *table(rows, column=30, indent=4)]


def key_lines(run: Mapping[str, Any], hydra: Mapping[str, Any], choices: Mapping[str, Any]) -> Iterator[list[str]]:
    """The keys of the run, of each group, and those of Hydra that flowtrain sets; with values and meanings."""
    ours = main_file().keys
    yield key_table({key: value for key, value in run.items() if key not in GROUPS}, ours)
    for group in GROUPS:
        if group in run:
            yield _keys_of(group, str(choices.get(group)), run)
    values = flattened({"hydra": hydra})
    yield ["  hydra", *key_table({key: values[key] for key in ours if key in values}, ours)]


def key_table(values: Mapping[str, Any], meaning: Mapping[str, str]) -> list[str]:
    """Lines of key=value with what the key means."""
    return key_table_of(flattened(values), meaning)


def key_table_of(values: Mapping[str, Any], meaning: Mapping[str, str]) -> list[str]:
    """The same as `key_table`, for values by dotted keys."""
    return table([(f"{key}={shown(value)}", meaning.get(key, "")) for key, value in values.items()])


def meanings(group: str, name: str) -> dict[str, str]:
    """What the keys of a choice mean, by its file and those that it has its other keys from."""
    said = read(group, name)
    found: dict[str, str] = {}
    for parent in said.parents:
        found |= meanings(group, parent)
    own = said.keys if said.whole else {f"{group}.{key}": text for key, text in said.keys.items()}
    return {**found, **{key: text for key, text in own.items() if text}}


def main_file() -> CommentedConfig:
    """configs/config.yaml."""
    return CommentedConfig((config_dir() / "config.yaml").read_text())


def table(rows: Sequence[Row], column: int = COLUMN, indent: int = 2) -> list[str]:
    """Two columns, the second wrapped; on the next line where the first is too long for its own."""
    lines: list[str] = []
    for left, right in rows:
        head = " " * indent + left
        wrapped = textwrap.wrap(right, WIDTH - column, break_on_hyphens=False) or [""]
        if len(head) > column - 2:
            lines.append(head)
            head = ""
        first, *others = wrapped
        lines += [f"{head:{column}}{first}".rstrip(), *(" " * column + line for line in others)]
    return [line for line in lines if line]
