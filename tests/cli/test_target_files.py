"""target=logistic_regression from the command line: the table is found from any folder, and errors are messages."""

from pathlib import Path

import pytest
from helpers import Evaluate, Run, Train

pytestmark = pytest.mark.usefixtures("without_figures")
FEW = ["data=target", "target=logistic_regression", "data.n_val=50", "data.n_test=100", "objective=reverse_kl"]
ROWS = "a,b c,kind\n1,0,no\n2,1,yes\n3,0,no\n4,5,yes\n"


def test_the_table_is_found_from_another_folder(
    trained: Train, evaluated: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # commas need quotes in Hydra's grammar, unless the file exists
    Path("my data, 1.csv").write_text(ROWS)
    run_dir = trained(*FEW, "target.path=my data, 1.csv", "target.label=kind")
    monkeypatch.chdir(tmp_path.parent)
    assert evaluated(run_dir)["n"] == 100


def test_missing_label_gives_one_message(run: Run) -> None:
    Path("t.csv").write_text(ROWS)
    code, out, err = run("flowtrain", "model=affine", *FEW, "target.path=t.csv", "target.label=sort")
    assert code != 0
    assert "target.label" in err
    assert "Traceback" not in out + err
