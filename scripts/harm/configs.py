"""Random command lines of `flowtrain` with valid and invalid values."""

import random
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from flowtrain.utils.files import config_dir
from harm.forks import try_flowtrain
from harm.part import Part

# files in the folder in which the commands run: a table, and a run to start from
TABLE, TEACHER = "table.npy", "teacher"
GROUPS = ("model", "data", "solver", "trainer", "objective", "regularizer")
# the config file that lists all keys of a group whose options share their keys
LISTED_IN = {"solver": "dopri5", "trainer": "default", "regularizer": "none"}
# keys that are never set: compiling takes a minute and is not a test of configs
LEFT_OUT = ("name", "_target_", "defaults", "compile")
TOP = {"seed": 0, "device": "auto", "threads": 1, "logger": ["jsonl"], "from": None, "resume": None, "trust": []}
DEFAULTS = {"model": "ffjord", "data": "moons", "solver": "dopri5", "objective": "likelihood"}
ADAPTIVE = ("dopri5", "tsit5", "bosh3", "dopri8", "adaptive_heun", "fehlberg2", "scipy_solver")

WORDS = {
    "activation": ["tanh", "softplus", "swish", "relu"],
    "field": ["concatsquash", "concat", "time_embedding"],
    "mixing": ["alternate", "permutation"],
    "trace": ["exact", "hutchinson", "auto"],
    "eval_trace": ["exact", "hutchinson", "auto"],
    "noise": ["rademacher", "gaussian"],
    "gradient": ["direct", "replay", "adjoint", "auto"],
    "control": ["state", "all"],
    "coupling": ["independent", "optimal"],
    "optimizer": ["adam", "adamw"],
    "lr_decay": ["cosine", "plateau", "constant"],
    "precision": ["float32", "bfloat16", "tf32"],
    "on_nonfinite": ["stop", "skip", "rewind"],
    "method": [*ADAPTIVE, "rk4", "euler"],
    "device": ["cpu", "auto", "cuda:9", "meta"],
    "event_shape": ["[3]", "[1,1,3]", "[3,1,1]", "[1,2,2]"],
    "columns": ["[0]", "[0,1]", "['0:2']", "[-1]", "[0,0]", "[9]", "x"],
    "label": ["3", "0", "-1", "c3"],
    "path": ["nowhere.npy", "/", "table.npy", "~"],
    "trust": ["[]", "[os]", "os"],
    "logger": ["[jsonl]", "[jsonl,tensorboard]", "[tensorboard]", "jsonl"],
    "from": ["null", "nowhere"],
    "resume": ["null", "nowhere"],
}
VALID_VALUES = {
    bool: ["true", "false"],
    int: ["0", "1", "2", "3", "5"],
    float: ["0", "1e-6", "0.001", "0.1", "0.5", "0.9", "1", "1.0", "3.7"],
    list: ["[4]", "[3,5]", "[1]", "[4,4,4]"],
    type(None): ["null", "1", "2", "0.5", "0.01", "true"],
}
# values that most keys refuse. No value may be valid and large, because a run of 2^31 - 1 steps would not end
INVALID_VALUES = [
    "-1", "0", "1.5", "many", "true", "null", "[]", "[1,2]", "[-1]", "[a]", "[[1]]", "{a: 1}", "1e400", "nan", "inf",
    "-inf", "1e-300", "1e30", "1e308", "-0.0", "2147483648", "99999999999999999999", "''", "'  '", "", "${seed}",
    "${nothing.there}", "'${oc.env:HOME}'", "???", "'a b'", "ü", "0x10", "1_000", "None", "no", "a,b", "choice(1,2)",
    "[1", "{", "\\", "$", "%s", "{x}",
]  # fmt: skip
SLIPS = [
    "~trainer.steps", "~model", "~data", "~solver", "~trainer", "~objective", "~seed", "~model.hidden", "+foo=1",
    "+trainer.foo=1", "+model.depth=3", "++trainer.foo=1", "foo=1", "foo.bar=1", "trainer.steps", "=3", "", " ",
    "model=null", "model=", "model=nowhere", "model=[realnvp,glow]", "model={}", "trainer={}", "trainer=3",
    "model.hidden.0=3", "solver@foo=rk4", "experiment=nowhere", "recipe=nowhere", "recipe=none", "trainer.steps.x=1",
    "model._target_=null", "model._target_=nowhere.at.all", "model._target_=flowtrain.flow.nothing", "+data.depth=1",
    "seed=1 seed=2", "trainer/foo=1", "hydra/launcher=nowhere", "trainer.steps=1,2", "+experiment=rings",
    "regularizer=[none,rnode]",
]  # fmt: skip


def configs(part: Part) -> None:
    """Tries all options one after another, each combined with random options."""
    turns = list(options())
    part.rng.shuffle(turns)
    for i in part.tries():
        try_flowtrain(random_config(part.rng, turns[i % len(turns)]), part.out, part)


@cache
def options() -> tuple[tuple[str, str], ...]:
    """Returns every option of every config group, except for experiments that are searches and train many runs."""
    every = ((path.parent.name, path.stem) for path in config_dir().glob("*/*.yaml"))
    return tuple(sorted(option for option in every if not option[1].startswith("search_")))


def companions(picked: dict[str, str]) -> dict[str, str]:
    """Returns the model, and the data or objective, that a recipe belongs to according to its name."""
    model, _, other = picked.get("recipe", "").partition("_")
    group = "data" if ("data", other) in options() else "objective"
    return {"model": model, group: other} if other else {}


def random_config(rng: random.Random, must: tuple[str, str] | None = None) -> list[str]:
    """Returns a command line for a small run in a folder prepared by `write_files`, with random options and keys.

    Args:
        must: an option that the command line contains.
    """
    picked = {**dict(rng.choice(options()) for _ in range(rng.randint(0, 3))), **dict([must] if must else [])}
    from_teacher = picked.get("objective") == "rectified" and rng.random() < 0.8
    if from_teacher:
        # the other run determines the model and the data
        picked = {g: name for g, name in picked.items() if g not in ("model", "data", "experiment", "recipe")}
    if "experiment" in picked:
        picked = {group: name for group, name in picked.items() if group not in ("model", "data")}
    elif rng.random() < 0.8:
        picked = {**companions(picked), **picked}
    chosen = {**DEFAULTS, **_experiment_choices(picked), **picked}
    invalid = rng.choice([0, 0.1, 0.4])
    keys = [random_key(rng, chosen, invalid) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5]))]
    slips = [rng.choice(SLIPS)] if rng.random() < 0.1 else []
    return [*small_run(picked, from_teacher), *keys, *slips]


def small_run(picked: dict[str, str], from_teacher: bool = False) -> list[str]:
    """Returns the command line of a run with the options, given by group, that takes about a second.

    Args:
        from_teacher: whether the run starts from another run.
    """
    chosen = {**DEFAULTS, **_experiment_choices(picked), **picked}
    small = small_keys(chosen["model"], chosen["data"], chosen["solver"], chosen["objective"])
    if from_teacher:
        small = [key for key in small if not key.startswith(("model.", "data."))]
        small += [f"from={TEACHER}", "objective.pairs=32"]
    return [*(f"{group}={name}" for group, name in picked.items()), *small]


def _experiment_choices(picked: dict[str, str]) -> dict[str, str]:
    """Returns the options, by group, that the picked experiment chooses."""
    if "experiment" not in picked:
        return {}
    entries = _content("experiment", picked["experiment"]).get("defaults", [])
    found = [item for entry in entries if isinstance(entry, dict) for item in entry.items()]
    return {key.removeprefix("override /"): str(name) for key, name in found}


def small_keys(model: str, data: str, solver: str = "dopri5", objective: str = "likelihood") -> list[str]:
    """Returns overrides that make a run small."""
    keys = ["device=cpu", "threads=1", "trainer.steps=2", "trainer.batch_size=8", "trainer.plot_every=null"]
    keys += {"realnvp": ["model.layers=2"], "glow": ["model.steps=2"]}.get(model, [])
    keys += ["model.candidates=[affine,realnvp]", "trainer.time_limit=null"] if model == "auto" else []
    keys += [] if model in ("affine", "auto", "mixture") else ["model.hidden=[4]"]
    keys += [f"data.path={TABLE}"] if data == "array" else ["data.n_val=16", "data.n_test=16"]
    keys += ["objective.matching=0.5"] if objective == "hybrid" else []
    return [*keys, "solver.rtol=1e-2" if solver in ADAPTIVE else "solver.steps=4"]


def random_key(rng: random.Random, chosen: dict[str, str], invalid: float = 0.3) -> str:
    """Returns an override of an existing key.

    Args:
        invalid: the probability of an invalid value.
    """
    known = {group: keys_of(group, chosen.get(group, "default")) for group in GROUPS}
    group = rng.choice([None, *(group for group in GROUPS if known[group])])
    keys = TOP if group is None else known[group]
    key = rng.choice(sorted(keys))
    default = keys[key]
    valid = WORDS.get(key) or VALID_VALUES.get(type(default)) or [str(default)]
    value = rng.choice(INVALID_VALUES if rng.random() < invalid else valid)
    return f"{key}={value}" if group is None else f"{group}.{key}={value}"


@cache
def keys_of(group: str, option: str) -> dict[str, Any]:
    """Returns the keys of an option with their defaults."""
    content = _content(group, LISTED_IN.get(group, option))
    return {key: value for key, value in content.get(group, content).items() if key not in LEFT_OUT}


def _content(group: str, option: str) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(config_dir() / group / f"{option}.yaml"))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def write_files(folder: Path) -> Path:
    """Writes a table whose last column is a label, and small images in MNIST's format. Returns the images' root."""
    rng = np.random.default_rng(0)
    np.save(folder / TABLE, np.column_stack([rng.normal(size=(80, 3)), np.arange(80) % 3]))
    for name, first in (("mnist", 5), ("fashion_mnist", 9)):
        (folder / "idx" / name).mkdir(parents=True)
        for kind, n in (("train", 60), ("t10k", 20)):
            images = rng.integers(0, 256, (n, 8, 8)).astype(np.uint8)
            labels = ((first + np.arange(n)) % 10).astype(np.uint8)
            for what, values in (("images-idx3", images), ("labels-idx1", labels)):
                head = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
                (folder / "idx" / name / f"{kind}-{what}-ubyte").write_bytes(head + values.tobytes())
    return folder / "idx"
