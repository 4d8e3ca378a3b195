"""The package finds its configs from every kind of installation."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flowtrain.utils.files import config_dir, config_groups

ROOT = Path(__file__).resolve().parents[2]


def test_config_groups_are_found_in_the_package() -> None:
    assert {"model", "data", "solver", "trainer", "objective", "experiment"} <= set(config_groups())


def test_wheel_built_from_the_sdist_runs_the_readme_examples(tmp_path: Path) -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not in a checkout")
    build = "import sys; from hatchling.build import build_sdist, build_wheel; print(eval(sys.argv[1])(sys.argv[2]))"

    def make(kind: str, cwd: Path) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", build, kind, str(tmp_path)], cwd=cwd, check=True, capture_output=True, text=True
        )
        return tmp_path / done.stdout.split()[-1]

    sdist = make("build_sdist", ROOT)
    subprocess.run(["tar", "xzf", sdist, "-C", tmp_path], check=True)
    wheel = make("build_wheel", tmp_path / sdist.name.removesuffix(".tar.gz"))
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "flowtrain/configs/config.yaml").exists()
    # py.typed tells type checkers to read the annotations of the package
    assert (site / "flowtrain/py.typed").exists()
    begin = f"import sys; sys.path.insert(0, {str(site)!r})"
    code = f"{begin}; import flowtrain.utils.files as p; print(p.config_dir())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == site / "flowtrain/configs"
    assert {p.name for p in config_dir().rglob("*.yaml")} == {
        p.name for p in (site / "flowtrain/configs").rglob("*.yaml")
    }
    # the long description for a package index, where relative links do not work
    description = next(site.glob("flowtrain-*.dist-info/METADATA")).read_text()
    assert "# flowtrain" in description
    assert not re.findall(r"\]\((?!https?:|#)", description)
    (tmp_path / "work").mkdir()
    readme = (site / "flowtrain/README.md").read_text()
    section = readme.partition("\n## From Python\n")[2].partition("\n## ")[0]
    tour = "\n".join(re.findall(r"^```python\n(.*?)^```$", section, re.S | re.M))
    done = subprocess.run(
        [sys.executable, "-c", f"{begin}\n{tour}"], cwd=tmp_path / "work", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "NLL" in done.stdout
