"""name=NAME: the directory of a run or a sweep."""

from pathlib import Path

import pytest
from helpers import SMALL, Run
from omegaconf import OmegaConf

pytestmark = pytest.mark.usefixtures("without_figures")

FAST = [*SMALL, "model=affine"]


def files() -> list[Path]:
    return sorted(Path().rglob("*"))


def recorded(run_dir: Path) -> object:
    return OmegaConf.load(run_dir / ".hydra/config.yaml")["name"]


@pytest.mark.parametrize("name", ["first", "my run (1)", "1e-3", "a,b", "it's", "ö=1"])
def test_a_name_gives_the_run_directory(run: Run, tmp_path: Path, name: str) -> None:
    code, out, err = run("flowtrain", *FAST, f"name={name}")
    assert code == 0, err
    run_dir = tmp_path / "outputs" / name
    assert out.splitlines()[-1] == str(run_dir)
    assert (run_dir / "result.json").is_file()
    assert recorded(run_dir) == name


def test_an_existing_run_is_refused_with_the_command_that_resumes_it(run: Run) -> None:
    assert run("flowtrain", *FAST, "name=first")[0] == 0
    before = files()
    code, out, err = run("flowtrain", *FAST, "name=first", "seed=1")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"resume={Path('outputs/first').absolute()}" in err
    assert files() == before


@pytest.mark.parametrize(
    "name",
    [
        *["a/b", "..", ".", "", ".hidden", "a\\b", "a\nb", "/tmp", " ", " a", "''", "${x}", "multirun", "2026-11-30"],
        *["x" * 256, "\N{SNOWMAN}" * 86, "a\udcff"],
    ],
)
def test_other_names_are_refused(run: Run, name: str) -> None:
    code, out, err = run("flowtrain", *FAST, f"name={name}")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "name=" in err
    assert files() == []


def test_a_sweep_has_its_name_and_is_continued_under_it(run: Run, tmp_path: Path) -> None:
    keys = ["-m", *FAST, "seed=0,1", "name=pair"]
    code, out, err = run("flowtrain", *keys)
    assert code == 0, err
    sweep = tmp_path / "outputs/multirun/pair"
    assert out.splitlines()[-1] == str(sweep)
    assert recorded(sweep / "0") == "pair"
    results = [(sweep / job / "result.json").stat().st_mtime_ns for job in ("0", "1")]
    assert run("flowtrain", *keys)[0] == 0
    assert [(sweep / job / "result.json").stat().st_mtime_ns for job in ("0", "1")] == results


def test_a_sweep_has_one_name(run: Run) -> None:
    code, out, err = run("flowtrain", "-m", *FAST, "name=p,q")
    assert (code, out, len(err.splitlines()), files()) == (2, "", 1, [])


def test_a_name_of_a_file_is_refused_and_the_file_is_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "outputs/multirun").mkdir(parents=True)
    for folder, flags in (("outputs", []), ("outputs/multirun", ["-m", "seed=0,1"])):
        (tmp_path / folder / "mine").write_text("a file")
        before = files()
        code, out, err = run("flowtrain", *FAST, *flags, "name=mine")
        assert (code, out, len(err.splitlines()), files()) == (2, "", 1, before)
        assert (tmp_path / folder / "mine").read_text() == "a file"


def test_directories_of_hydra_win_over_the_name(run: Run, tmp_path: Path) -> None:
    for arguments in (["name=a", "hydra.run.dir=b"], ["hydra.run.dir=c", "name=a"]):
        code, _, err = run("flowtrain", *FAST, *arguments)
        assert code == 0, err
    assert not (tmp_path / "outputs").exists()
    assert recorded(tmp_path / "b") == recorded(tmp_path / "c") == "a"


def test_a_resumed_run_keeps_its_directory(run: Run, tmp_path: Path) -> None:
    assert run("flowtrain", *FAST, "name=first")[0] == 0
    code, out, err = run("flowtrain", "resume=outputs/first", "name=second")
    assert (code, out) == (2, "")
    assert "name" in err
    code, out, err = run("flowtrain", "resume=outputs/first", "trainer.steps=6")
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "outputs/first")


def test_without_a_name_the_directory_is_the_time(run: Run) -> None:
    code, out, err = run("flowtrain", *FAST, "name=null")
    assert code == 0, err
    assert len(Path(out.splitlines()[-1]).relative_to(Path("outputs").absolute()).parts) == 2


def test_help_and_cfg_take_a_name(run: Run) -> None:
    code, out, err = run("flowtrain", "name=my run (1)", "--help", "hydra.run.dir")
    assert (code, "outputs/my run (1)" in out) == (0, True), err
    code, out, err = run("flowtrain", "name=my run (1)", "--cfg", "job")
    assert (code, "name: my run (1)" in out, files()) == (0, True, []), err
