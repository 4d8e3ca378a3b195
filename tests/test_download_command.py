"""scripts/download_mnist.py as a user runs it."""

from pathlib import Path

import pytest
from mirrors import CONTENT, EXPECTED, HALF, ROOT, Serve, dead, download

from flowtrain.data.images import default_root

SUMS = ROOT.parent / "shared" / "data" / "SHA256SUMS"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FILES", {name: {"a.gz": EXPECTED, "b.gz": EXPECTED} for name in download.FILES})


@pytest.mark.usefixtures("small")
def test_the_command_prints_a_line_a_file(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror = serve()
    arguments = ["mnist", "fashion_mnist", "--root", str(tmp_path), "--mirror", mirror.url.rstrip("/")]
    assert download.main(arguments) == 0
    files = [tmp_path / name / file for name in ("mnist", "fashion_mnist") for file in ("a.gz", "b.gz")]
    assert [file.read_bytes() == CONTENT for file in files] == [True] * 4
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [f"{file}: 300000 bytes from {mirror.url}{file.name}" for file in files]
    assert download.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [f"{file}: is there already" for file in files]
    assert len(mirror.asked) == 4


@pytest.mark.usefixtures("small")
def test_dead_mirrors_give_one_message_and_leave_what_was_there(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnist").mkdir()
    kept = {"a.gz": b"damaged", "a.gz.part": CONTENT[:HALF], "b.gz": b"damaged too"}
    for name, content in kept.items():
        (tmp_path / "mnist" / name).write_bytes(content)
    mirrors = [dead(), serve(code=404).url, "nonsense"]
    asked = [word for mirror in mirrors for word in ("--mirror", mirror)]
    assert download.main([*asked, "mnist", "--root", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    reasons = ["Connection refused", "HTTP 404 Not Found", "unknown url type"]
    assert [part for part in (*mirrors, *reasons, str(tmp_path / "mnist/a.gz"), "--mirror") if part not in err] == []
    assert {p.name: p.read_bytes() for p in (tmp_path / "mnist").iterdir()} == kept


@pytest.mark.usefixtures("small")
def test_the_usual_mirrors_are_tried_in_turn(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = serve()
    monkeypatch.setattr(download, "MIRRORS", {"mnist": (dead(), good.url), "fashion_mnist": ()})
    monkeypatch.setenv("FLOWTRAIN_DATA", str(tmp_path))
    assert download.main([]) == 0
    assert (tmp_path / "mnist" / "b.gz").read_bytes() == CONTENT
    assert capsys.readouterr().err == ""


def test_a_root_that_cannot_be_written_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert download.main(["--root", str(tmp_path / "file"), "--mirror", dead()]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_data_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        download.main(["cifar"])
    assert "no data set cifar; choose mnist or fashion_mnist" in capsys.readouterr().err


def test_the_root_is_where_flowtrain_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FLOWTRAIN_DATA", "~/here"), ("FLOWTRAIN_DATA", ""), ("XDG_CACHE_HOME", "/cache")):
        monkeypatch.setenv(name, value)
        assert download.default_root() == default_root()


def test_the_sums_are_those_of_the_real_files(capsys: pytest.CaptureFixture[str]) -> None:
    if not SUMS.exists():
        pytest.skip(f"{SUMS} not found")
    published = {name: digest for digest, name in (line.split() for line in SUMS.read_text().splitlines())}
    stated = {f"{name}/{file}": s.sha256 for name, files in download.FILES.items() for file, s in files.items()}
    assert stated == {name: digest for name, digest in published.items() if name.endswith("ubyte.gz")}
    assert download.main([*download.FILES, "--root", str(SUMS.parent), "--mirror", dead()]) == 0
    assert capsys.readouterr().out.count("is there already") == 8
