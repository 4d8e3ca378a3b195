"""`flowtrain --help`: an overview, help on a topic, and the full listing, from the config files and their comments."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
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
from flowtrain.cli.error_messages import keys_of_choice
from flowtrain.cli.from_run import with_choices_of_from
from flowtrain.cli.overrides import (
    SWEEP,
    VALUED,
    check_known_keys,
    quoted,
    validate_command_line,
    with_default_choices,
    with_name,
)
from flowtrain.cli.usage import Row, joined, paragraph, table
from flowtrain.runs.compose import applied_recipes, read_file, values_of
from flowtrain.utils.arguments import nearest
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import config_dir
from flowtrain.utils.formatting import flattened, shown

# the columns at which descriptions of keys and of choices begin
KEY_COLUMN, CHOICE_COLUMN = 36, 30
# the groups in the order of the help, the most used ones first
GROUPS = ("model", "data", "target", "objective", "regularizer", "solver", "trainer", "recipe", "experiment")
# groups whose choices the overview does not list, and the text that it shows instead
NOT_LISTED = {
    "recipe": "(applies automatically; see flowtrain --help recipe)",
    "experiment": "(settings with measured results; see flowtrain --help experiment)",
}
# topics of --help that are neither groups, choices nor keys
ALL, RUNS = "all", "runs"

# flags whose value is the next argument
FLAGS_WITH_VALUE = (*VALUED, "-i", "--info")

HEAD = [
    "flowtrain: fits densities with normalizing flows, scores and samples them",
    "Usage: flowtrain [GROUP=CHOICE ...] [KEY=VALUE ...] [FLAG ...]",
]
EXAMPLES: list[Row] = [
    ("flowtrain", "FFJORD on two moons (defaults)"),
    ("flowtrain data=array data.path=a.csv", "your table, several models"),
    ("flowtrain data=array data.path=a.csv model=nsf", "your table, one model"),
    ("flowtrain target=energy1", "a density known up to a constant"),
    ("flowtrain model=nsf name=first", "run directory: outputs/first"),
    ("flowtrain -m model=nsf,maf seed=0,1", "a sweep of four runs"),
    ("flowtrain resume=outputs/first", "continues a stopped run"),
    ("floweval outputs/first", "test NLL with its error"),
    ("flowsample outputs/first n=10000", "draws samples"),
]
# the keys of the overview. Each has a value, which is shown if the composed config lacks the key, and a meaning
KEYS: dict[str, Row] = {
    "data.path": ("FILE", "your table: .csv, .npy, .parquet"),
    "name": ("NAME", "the run is outputs/NAME; null: date and time"),
    "seed": ("0", "seed of weights, batches and trace noise"),
    "device": ("auto", "auto, cpu, cuda or cuda:1"),
    "time_budget": ("SECONDS", "seconds for the whole command; null: no limit"),
    "model.hidden": ("[64,64]", "widths of the hidden layers"),
    "trainer.steps": ("1000", "number of updates of the weights"),
    "trainer.lr": ("0.001", "the highest learning rate"),
    "solver.rtol": ("1e-5", "tolerance of the ODE solver, for continuous flows"),
}
OVERVIEW_FLAGS: list[Row] = [
    ("-m", "a sweep: KEY=A,B makes one run for each value"),
    ("--cfg job", "prints the composed config and runs nothing"),
]
MORE: list[Row] = [
    ("flowtrain --help model", "a group: its choices, and keys of the chosen one"),
    ("flowtrain --help nsf", "a choice, or a key: flowtrain --help trainer.lr"),
    ("flowtrain runs", "lists runs; flowtrain runs --help"),
    ("flowtrain --help all", "all choices, keys, flags, exit codes, completion"),
]
FLAGS: list[Row] = [
    ("-h, --help", "an overview for this command line, as in flowtrain model=glow data=mnist --help"),
    ("--help TOPIC", "help on a group, a choice or a key, as in flowtrain --help trainer"),
    ("--help all", "this text"),
    ("--version", "the versions of flowtrain, torch and Python"),
    (
        "-m, --multirun",
        "a sweep: KEY=A,B or GROUP=A,B makes one run of each value. hydra/launcher chooses how they run",
    ),
    ("--cfg job", "prints the composed config and runs nothing; with -p trainer, that part only"),
    ("--cfg hydra", "prints Hydra's own config"),
    ("--info defaults-tree", "prints which config file chooses which, and runs nothing"),
    (
        "--info defaults",
        "prints the config files in the order of merging; later files override earlier ones",
    ),
    ("--info searchpath", "prints the folders in which config files are searched"),
    ("--info", "prints all of these, the plugins and the config"),
    ("--config-dir DIR", "adds a folder of your own configs: DIR/model/mine.yaml is model=mine"),
    ("--hydra-help", "prints the flags and the groups of Hydra itself"),
]
COMPLETION: list[Row] = [
    ('eval "$(flowtrain -sc install=bash)"', "bash. Add this line to ~/.bashrc to keep it"),
    ('eval "$(flowtrain -sc install=bash)"', "zsh, after autoload -Uz bashcompinit && bashcompinit"),
    ("flowtrain -sc install=fish | source", "fish"),
]
CODES: list[Row] = [
    ("0", "the run has ended, possibly by early stopping or trainer.time_limit"),
    ("1", "an error during the run: a failed solve, a full disk, a failed job of a sweep"),
    ("2", "a mistake in the command line: one message on standard error names it, and nothing was run"),
    ("128 + n", "stopped by signal n (130: Ctrl-C). The run is saved, and resume=RUN_DIR continues it"),
]
OUTPUT = (
    "The last line of standard output is the run directory. For a sweep, it is the directory of all its runs. Messages "
    "and progress go to standard error and to RUN_DIR/flowtrain.log."
)


def asked(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for help."""
    return any(a in ("-h", "--help") for a in arguments)


def help_text(arguments: Sequence[str]) -> str:
    """Returns the help for a command line: the overview, the full listing, or the help on its topics.

    Raises:
        ConfigError, HydraException: a mistake in the command line.
    """
    about = topics(arguments)
    arguments = with_name(quoted([argument for argument in arguments if argument not in about]))
    arguments = with_default_choices(arguments)
    validate_command_line(arguments)
    overrides = overrides_of(with_choices_of_from(arguments))
    if about:
        return topic_text(about, (ALL, RUNS), overrides)
    run, hydra = composed(overrides)
    return overview(run, hydra["runtime"]["choices"])


def overview(run: Mapping[str, Any], choices: Mapping[str, Any]) -> str:
    """Returns the overview, which fits on two screens: examples, groups, the most used keys, and flags."""
    groups = []
    for group in GROUPS:
        names = [f"*{name}" if name in _chosen(group, choices) else name for name in options(group)]
        if len(names) == 1:
            # there is nothing to choose
            continue
        if group in NOT_LISTED:
            names = [*(name for name in names if name[0] == "*"), NOT_LISTED[group]]
        groups.append((group, " ".join(names)))
    values = flattened(run)
    keys = []
    for key, (value, text) in KEYS.items():
        if key in values:
            keys.append((f"{key}={shown(values[key])}", text))
        else:
            having = choices_with(key)
            only = having[0] if len(having) == 1 else f"not {key.partition('.')[0]}={choices[key.partition('.')[0]]}"
            keys.append((f"{key}={value}", f"{text} ({only})"))
    blocks = [
        HEAD,
        ["Examples", *table(EXAMPLES, column=50)],
        ["Groups (GROUP=CHOICE; * marks the choices of this command line)", *table(groups, column=15)],
        ["Keys used most (KEY=VALUE; with the values of this command line)", *table(keys, column=28)],
        ["Flags, and more help", *table([*OVERVIEW_FLAGS, *MORE], column=28)],
    ]
    return joined(blocks)


def full_text(run: Mapping[str, Any], hydra: Mapping[str, Any]) -> str:
    """Returns the help on every choice of the groups, every key of the composed config, and every flag."""
    choices = hydra["runtime"]["choices"]
    blocks = [
        HEAD,
        ["Examples", *table(EXAMPLES, column=50)],
        ["Recipe", *recipe_lines(run, choices)],
        ["Groups (GROUP=CHOICE; * marks the choices of this command line)"],
        *(group_lines(group, choices) for group in GROUPS),
        ["Keys (KEY=VALUE; with the values of this command line)"],
        *key_lines(run, hydra, choices),
        ["Flags", *table(FLAGS, column=26)],
        ["Tab completion of groups, choices and keys", *table(COMPLETION, column=42)],
        ["Output and exit codes", *paragraph(OUTPUT)],
        table(CODES, column=12),
    ]
    return joined(blocks)


def topics(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments that are neither flags nor overrides, such as `trainer` in `flowtrain --help trainer`."""
    rest = split_config_dir(arguments)[1]
    found = zip(["", *rest], rest, strict=False)
    return [
        a for before, a in found if a.strip() and "=" not in a and a[0] not in "-~" and before not in FLAGS_WITH_VALUE
    ]


def topic_text(about: Sequence[str], others: Iterable[str] = (), overrides: Sequence[str] = ()) -> str:
    """Returns the help on groups, their choices and keys.

    Args:
        others: further known topics, for the suggestions of the message.
        overrides: overrides on the command line, which select choices and set keys.

    Raises:
        ConfigError: an unknown topic.
    """
    run, hydra = composed(overrides)
    return "\n\n".join(_on(topic, run, hydra, others, overrides) for topic in about)


def _on(
    topic: str, run: Mapping[str, Any], hydra: Mapping[str, Any], others: Iterable[str], overrides: Sequence[str]
) -> str:
    """Returns the help on one topic."""
    choices = hydra["runtime"]["choices"]
    if topic in others and topic == ALL:
        return full_text(run, hydra)
    if topic in others and topic == RUNS:
        from flowtrain.cli import list_runs

        return list_runs.USAGE.full()
    if topic in GROUPS:
        return joined([group_lines(topic, choices), keys_of_group(topic, str(choices[topic]), run)])
    values, said = _within(topic, {**flattened(run), **_hydra_values(hydra)}), dict(main_file().keys)
    if values:
        for group in GROUPS:
            said |= meanings(group, str(choices[group])) if group in run else {}
        return "\n".join(key_table_of(values, said))
    chosen_by = [group for group in GROUPS if topic in options(group)]
    if chosen_by:
        return joined([block for group in chosen_by for block in _on_choice(group, topic, overrides)])
    if having := choices_with(topic):
        return joined(_on_key_elsewhere(topic, having))
    keys = {key for group in GROUPS for name in options(group) for key in keys_of_choice(group, name)}
    keys = {key for key in keys if not key.startswith("hydra")}
    names = [*GROUPS, *others, *flattened(run), *(name for group in GROUPS for name in options(group)), *sorted(keys)]
    rest = f"topics are {', '.join(others)}, the groups {', '.join(GROUPS)}, their choices, and keys such as trainer.lr"
    near = nearest(topic, names) or get_close_matches(topic, names, n=3, cutoff=0.65)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"{topic}: unknown help topic; {meant}{rest}")


def _within(topic: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the value of a key, or the values of the keys below it."""
    return {key: value for key, value in values.items() if key == topic or key.startswith(f"{topic}.")}


def _on_choice(group: str, name: str, overrides: Sequence[str]) -> list[list[str]]:
    """Returns the help on a choice of a group: its description, its keys, and the keys of other groups that it sets."""
    kept = [a for a in overrides if (key := a.lstrip("+").partition("=")[0]) in GROUPS and key != group]
    about = table([(f"{group}={name}", read(group, name).sentence)], CHOICE_COLUMN)
    run = composed([*kept, f"{group}={name}"])[0]
    own = keys_of_group(group, name, run)
    file = read_file(group, name, config_dirs())
    sets = {} if file is None else {key.lstrip("/"): value for key, value in file.choices.items()}
    sets |= {k: v for k, v in flattened(values_of(group, name, config_dirs())).items() if not k.startswith(f"{group}.")}
    also = " ".join(f"{key}={shown(value)}" for key, value in sets.items() if not key.startswith("hydra"))
    return [about, own, paragraph(f"It also sets {also}") if also else []]


def choices_with(key: str) -> list[str]:
    """Returns the choices, such as data=array, whose files set a key of the same group, or keys below it."""
    group = key.partition(".")[0]
    if group not in GROUPS or key == group:
        return []
    return [f"{group}={name}" for name in options(group) if _within(key, dict.fromkeys(keys_of_choice(group, name)))]


def _on_key_elsewhere(key: str, having: Sequence[str]) -> list[list[str]]:
    """Returns the help on a key that only other choices of its group have, with these choices."""
    found: dict[tuple[str, ...], list[str]] = {}
    for choice in having:
        group, _, name = choice.partition("=")
        values = _within(key, flattened(values_of(group, name, config_dirs())))
        found.setdefault(tuple(key_table_of(values, meanings(group, name))), []).append(choice)
    return [[f"  Applies with {' or '.join(names)}", *lines] for lines, names in found.items()]


def keys_of_group(group: str, name: str, run: Mapping[str, Any]) -> list[str]:
    """Returns the keys of a group with their values in the composed config, except `name` and `_target_`."""
    values = {k: v for k, v in flattened({group: run.get(group) or {}}).items() if k.partition(".")[2]}
    shown_keys = {key: value for key, value in values.items() if key not in (f"{group}.name", f"{group}._target_")}
    return [f"  Keys with {group}={name}", *key_table_of(shown_keys, meanings(group, name))] if shown_keys else []


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """Returns the overrides among the arguments. For a sweep, returns the overrides of its first run."""
    rest = split_config_dir(arguments)[1]
    words = [
        a
        for before, a in zip(["", *rest], rest, strict=False)
        if not a.startswith("-") and before not in FLAGS_WITH_VALUE
    ]
    if not {*SWEEP} & {*rest}:
        return words
    return [word for override in OverridesParser.create().parse_overrides(words) for word in first_of(override)]


def first_of(override: Override) -> list[str]:
    """Returns an override with the first of its values; empty if it has no first value, for example an interval."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    value, key = override.value(), override.get_key_element()
    if isinstance(value, Glob):
        return [f"{key}={name}" for name in value.filter(list(options(override.key_or_group)))[:1]]
    if not override.is_discrete_sweep():
        return []
    return [f"{key}={next(override.sweep_string_iterator())}"]


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the composed config of a run, and Hydra's part of the config without interpolation."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        whole = compose("config", [*own_searchpath(), *overrides], return_hydra_config=True)
    hydra = OmegaConf.to_container(whole.hydra)
    run = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    return check_known_keys(plain(run)), cast(dict[str, Any], hydra)


def recipe_lines(run: Mapping[str, Any], choices: Mapping[str, Any]) -> list[str]:
    """Returns the explanation of recipes, and the keys that the recipes of this command line set."""
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
    return paragraph(said)


def _chosen(group: str, choices: Mapping[str, Any]) -> list[str | None]:
    """Returns the choices of a group on this command line. The group `recipe` has two, for objective and data."""
    return [choices.get(group), choices.get(f"{group}@_global_")]


def group_lines(group: str, choices: Mapping[str, Any]) -> list[str]:
    """Returns a group with its description and its choices. A * marks the choices of this command line."""
    names = _chosen(group, choices)
    rows = [(f"{'*' if name in names else ' '} {name}", read(group, name).sentence) for name in options(group)]
    about = table([(group, main_file().groups[group])], column=CHOICE_COLUMN)
    return [*about, *table(rows, column=CHOICE_COLUMN, indent=4)]


def key_lines(run: Mapping[str, Any], hydra: Mapping[str, Any], choices: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yields the keys of the run, of each group, and of Hydra if flowtrain sets them, with values and meanings."""
    ours = main_file().keys
    yield key_table_of(flattened({key: value for key, value in run.items() if key not in GROUPS}), ours)
    for group in GROUPS:
        if group in run:
            name = str(choices.get(group))
            yield [f"  {group}={name}", *key_table_of(flattened({group: run[group]}), meanings(group, name))]
    yield ["  hydra", *key_table_of(_hydra_values(hydra), ours)]


def _hydra_values(hydra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of Hydra's keys that configs/config.yaml sets."""
    values = flattened({"hydra": hydra})
    return {key: values[key] for key in main_file().keys if key in values}


def key_table_of(values: Mapping[str, Any], meaning: Mapping[str, str]) -> list[str]:
    """Returns lines of KEY=VALUE with the meanings of the keys, for values by dotted keys."""
    return table([(f"{key}={shown(value)}", meaning.get(key, "")) for key, value in values.items()], KEY_COLUMN)


def meanings(group: str, name: str) -> dict[str, str]:
    """Returns the meanings of the keys of a choice, from the comments in its file and in the files that it extends."""
    said = read(group, name)
    found: dict[str, str] = {}
    for parent in said.parents:
        found |= meanings(group, parent)
    own = said.keys if said.whole else {f"{group}.{key}": text for key, text in said.keys.items()}
    return {**found, **{key: text for key, text in own.items() if text}}


def main_file() -> CommentedConfig:
    """Returns configs/config.yaml with its comments."""
    return CommentedConfig((config_dir() / "config.yaml").read_text())
