"""The scripts in scripts/examples run, and the flows that they fit are useful."""

from pathlib import Path

import numpy as np
import pytest
import torch
from examples import anomalies, digits, table
from matplotlib import image


@pytest.mark.slow
def test_table_example_beats_the_gaussian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nll = table.main(minutes=0.05, out=str(tmp_path / "table.pt"))
    # compare with the NLL of a Gaussian with the covariance of the table
    x = table.generated()
    covariance = torch.from_numpy(np.cov(x.T))
    gaussian = torch.distributions.MultivariateNormal(torch.from_numpy(x.mean(0)), covariance).entropy()
    assert nll < float(gaussian)
    csv = tmp_path / "mine.csv"
    csv.write_text("a,b\n" + "\n".join(f"{a},{b}" for a, b in x[:200, :2]))
    table.main(str(csv), minutes=0.01, out=str(tmp_path / "mine.pt"))
    assert (tmp_path / "mine.pt").is_file()


@pytest.mark.slow
def test_anomalies_example_reaches_auroc() -> None:
    assert anomalies.main(minutes=0.05) > 0.7


@pytest.mark.slow
def test_digits_example_writes_a_figure(tmp_path: Path) -> None:
    digits.main(minutes=0.02, out=str(tmp_path / "digits.png"))
    assert image.imread(tmp_path / "digits.png").shape[:2] == (400, 400)
