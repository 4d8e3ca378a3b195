"""Python composes the same configs as Hydra."""

import pytest

from flowtrain.cli.config_files import compose_defaults
from flowtrain.runs.compose import COMMAND_KEYS, compose, options, read_yaml
from flowtrain.utils.errors import ConfigError
from flowtrain.utils.files import config_dir


def names(group: str) -> list[str]:
    return options(group, [config_dir()])


# search_moons is a sweep, not a single run
CASES = [
    *({"model": model, "data": data} for model in names("model") for data in names("data")),
    *({"model": "ffjord", "data": data, "objective": o} for data in ("array", "mnist") for o in names("objective")),
    *({group: name} for group in ("solver", "regularizer", "recipe") for name in names(group)),
    *({"experiment": name} for name in names("experiment") if name != "search_moons"),
    {"experiment": "mnist_glow", "data": "fashion_mnist", "recipe": "none"},
    {"trainer.lr": 1e-3, "solver": "tsit5", "solver.rtol": 1e-6, "model.hidden": [8, 8], "logger": ["jsonl"]},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_config_equals_the_hydra_config(settings: dict[str, object]) -> None:
    expected = compose_defaults([f"{key}={value}".replace(" ", "") for key, value in settings.items()])
    assert compose(settings).config == {key: v for key, v in expected.items() if key not in COMMAND_KEYS}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": "ffjrod"}, "ffjord"),
        ({"trainer.learning_rate": 1}, "trainer.lr"),
        ({"trainr.lr": 1}, "trainer.lr"),
        ({"trainer.lr": object()}, "trainer.lr"),
        ({"experiment": "search_moons"}, "flowtrain -m"),
        ({"model": {"hiden": [8]}}, "model.hidden"),
    ],
)
def test_invalid_key_error_names_the_nearest_key(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as e:
        compose(settings)
    assert named in str(e.value)


def test_recipes_list_the_keys_that_they_set() -> None:
    found = compose({"model": "ffjord", "data": "rings", "trainer.lr": 0.5})
    assert set(found.recipes["ffjord_rings"]) == {
        "solver.train_rtol",
        "solver.warmup",
        "trainer.batch_size",
        "trainer.steps",
    }


@pytest.mark.parametrize("text", ["1:3", "0:2", "10:20", "1e3abc"])
def test_ranges_of_columns_and_words_with_digits_are_text(text: str) -> None:
    assert read_yaml(text) == text
