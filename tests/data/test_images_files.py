"""data=mnist and data=fashion_mnist: the search for the four files, and files that are refused."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Refused
from helpers.files import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, H, W, bytes_of, write_set

from flowtrain.data.images import IDXImages, default_root
from flowtrain.utils.errors import ConfigError, DataError

# The search for the files


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("below", ["mnist", "."])
def test_files_are_in_the_folder_of_their_name_or_in_the_root(
    tmp_path: Path, below: str, gz: bool, make: Callable[..., IDXImages]
) -> None:
    write_set(tmp_path / below, gz=gz)
    assert make(tmp_path).event_shape == (1, H, W)


def test_the_folder_of_the_name_comes_first_and_folders_are_not_mixed(
    tmp_path: Path, make: Callable[..., IDXImages], refused: Refused
) -> None:
    write_set(tmp_path, n=30)
    write_set(tmp_path / "mnist", n=40)
    assert len(make(tmp_path, n_val=35).val) == 35
    (tmp_path / "mnist" / f"{TEST_LABELS}.gz").unlink()
    refused(lambda: make(tmp_path, n_val=35), ConfigError, [str(tmp_path / f"{TRAIN_IMAGES}.gz")])


def test_a_downloaded_file_comes_before_a_plain_one(tmp_path: Path, make: Callable[..., IDXImages]) -> None:
    write_set(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_bytes(b"damaged")
    assert make(tmp_path).event_shape == (1, H, W)


def test_the_root_is_that_of_the_key_or_the_environment_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FLOWTRAIN_DATA", str(tmp_path / "env"))
    for n, folder in ((30, "key"), (40, "env/mnist"), (50, "cache/flowtrain/mnist"), (60, "home/.cache/flowtrain")):
        write_set(tmp_path / folder, n=n)

    def rows(root: str | None) -> int:
        return len(IDXImages("mnist", root, n_val=10)._store.train) + 10

    assert rows(str(tmp_path / "key")) == 30
    assert rows(None) == 40
    monkeypatch.setenv("FLOWTRAIN_DATA", "~/.cache/flowtrain")
    assert rows(None) == 60
    monkeypatch.setenv("FLOWTRAIN_DATA", "")
    assert rows(None) == 50
    monkeypatch.delenv("FLOWTRAIN_DATA")
    assert rows(None) == 50
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert rows(None) == rows("~/.cache/flowtrain") == 60
    assert default_root() == tmp_path / "home/.cache/flowtrain"
    monkeypatch.chdir(tmp_path)
    assert rows("key") == 30


def test_absent_files_say_where_and_what_to_run(
    tmp_path: Path, refused: Refused, make: Callable[..., IDXImages]
) -> None:
    root = tmp_path / "my data"
    run = f"python scripts/download_mnist.py mnist --root {shlex.quote(str(root))}"
    refused(
        lambda: make(root),
        DataError,
        ["mnist", f"{TRAIN_IMAGES}.gz", f"{root / 'mnist'} nor in {root};", run, "data.root"],
    )
    (write_set(root) / f"{TEST_LABELS}.gz").unlink()
    refused(lambda: make(root), DataError, [f"{root} (which lacks {TEST_LABELS})", run])


# Files that are refused

FIRST_FASHION = np.array([9, 0, 0, 3, 0, 2, 7, 2, 5, 5] * 5, dtype=np.uint8)

BAD_SETS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "damaged": ({"t10k_images": b"no"}, TEST_IMAGES, ["is not an IDX file"]),
    "too few labels": ({"train_labels": bytes_of(49) % 10}, TRAIN_LABELS, ["50 images", "49 labels"]),
    "too many test labels": ({"t10k_labels": bytes_of(21) % 10}, TEST_LABELS, ["20 images", "21 labels"]),
    "labels for images": ({"train_images": bytes_of(50)}, TRAIN_IMAGES, ["(50,)", "(n, H, W)"]),
    "images for labels": ({"t10k_labels": bytes_of(20, H, W)}, TEST_LABELS, [f"(20, {H}, {W})", "(n,)"]),
    "a label of 10": (
        {"train_labels": np.arange(50, dtype=np.uint8) % 11},
        TRAIN_LABELS,
        ["row 10", "is 10", "between 0 and 9"],
    ),
    "sizes that differ": ({"t10k_images": bytes_of(20, H, W + 1)}, TEST_IMAGES, ["4 x 6", "4 x 7"]),
    "another set": ({"train_labels": FIRST_FASHION}, TRAIN_LABELS, ["belongs to fashion_mnist", "data=fashion_mnist"]),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, case: str, refused: Refused, make: Callable[..., IDXImages]
) -> None:
    changed, name, fragments = BAD_SETS[case]
    write_set(tmp_path, **changed)
    run = "download_mnist.py mnist --root"
    refused(lambda: make(tmp_path), DataError, [str(tmp_path / f"{name}.gz"), *fragments, run])


BAD_OPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"n_val": 50}, ["data.n_val=50", "at most 49"]),
    ({"n_val": 0}, ["data.n_val=0"]),
    ({"n_val": None}, ["data.n_val=None"]),
    ({"n_test": 21}, ["data.n_test=21", "at most 20"]),
    ({"n_test": 0}, ["data.n_test=0"]),
    ({"crop": W}, [f"data.crop={W}", "6 pixels"]),
    ({"crop": -1}, ["data.crop=-1"]),
    ({"crop": True}, ["data.crop=True"]),
    ({"alpha": 0}, ["data.alpha=0", "greater than 0"]),
    ({"alpha": 0.5}, ["data.alpha=0.5", "below 0.499"]),
    ({"alpha": "x"}, ["data.alpha=x"]),
    ({"root": ""}, ["data.root="]),
    ({"root": 5}, ["data.root=5"]),
    ({"dataset": "cifar"}, ["data.dataset=cifar", "mnist, fashion_mnist"]),
]


@pytest.mark.parametrize(("options", "fragments"), BAD_OPTIONS, ids=str)
def test_invalid_options_are_refused(
    tmp_path: Path, options: dict[str, Any], fragments: list[str], refused: Refused
) -> None:
    arguments = {"dataset": "mnist", "root": str(write_set(tmp_path)), "n_val": 10, **options}
    refused(lambda: IDXImages(**arguments), ConfigError, fragments)
