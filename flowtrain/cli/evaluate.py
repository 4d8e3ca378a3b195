"""The command line of `floweval`: its options, and their help. This module does not import torch."""

import sys
from typing import Any

from flowtrain.cli.arguments import split_own
from flowtrain.cli.error_messages import run_command
from flowtrain.cli.late_imports import loading
from flowtrain.cli.usage import DEVICE_TEXT, RUN_TEXT, TRUST_TEXT, WEIGHTS_TEXT, Usage
from flowtrain.runs.console import messages

USAGE = Usage(
    name="floweval",
    summary="computes the NLL of a run on held-out or new data, with its error, and checks the density",
    arguments=["RUN [KEY=VALUE ...]"],
    examples=[
        ("floweval outputs/first", "the test set of the run"),
        ("floweval outputs/first report=true", "the same, with report.md and report.html"),
        ("floweval outputs/first data.path=new.csv scores=s.csv", "log p(x) of every row of a new file"),
        ("floweval outputs/first data.path=b.csv anomalies=a.csv", "the unusual rows of a new file"),
        ("floweval outputs/first ood=fashion_mnist", "how well log p(x) separates other data"),
        ("floweval outputs/first solver.rtol=1e-7", "a tighter ODE solve"),
        ("floweval outputs/multirun/grid", "a sweep (name=grid), as an ensemble"),
    ],
    options={
        "ckpt": RUN_TEXT,
        "weights": WEIGHTS_TEXT,
        "split": "test (default), val, or all (every row of data.path). The rows keep their order. The default is all "
        "if data.path is given",
        "scores": "A .csv, .parquet or .npy file for log p(x) of every row, in nats. The rows keep their order. "
        "log p is -inf if the density is zero. It is NaN, or an empty cell, if it cannot be computed, or if the row "
        "has a missing value and data.missing=drop. Tables have the columns row (the row number in the file, from 0) "
        "log_prob and error, the estimated absolute error of log_prob in nats, empty without an estimate. With "
        "data.id=COLUMN, the first column contains the ids. For an ensemble, the column spread is "
        "the standard deviation of log p(x) between members, and FILE_members.npy beside a .npy file contains log p(x) "
        "of each member, (rows, members). .parquet needs polars (pip install 'flowtrain[tables]')",
        "grid": "A .npz file for log p on a grid, for samples of one or two columns. It contains the axes x and y, "
        "log_prob, with the first index along x, and columns, the names of the axes. The axes cover the evaluated rows "
        "from the 0.5% to the 99.5% quantile, and 12% of this range further on both sides. For whole numbers, log_prob "
        "is the log density of the numbers plus noise in [0, 1)",
        "grid_points": "Number of grid points of each axis (default: 200)",
        "label": "The class of the grid, for a conditional model. Default: the mean density over the classes",
        "ood": "A second data set, to be distinguished by log p(x): a file, or the name of data. A name stands for its "
        "test set. The AUROC is added to the table, and plots/ood.png is drawn. With scores=s.csv, s_ood.csv is "
        "written. The entropy H of the typicality score is the NLL of the validation set of the run. "
        "If that set is missing, H is the NLL of the scored rows",
        "anomalies": "A .csv or .parquet file for the decisions which rows are anomalies. The p-value of a row "
        "compares its log p with the validation rows of the run (conformal p-value). The file has the columns row, "
        "log_prob, p_value, anomaly (0 or 1), and for anomalies the columns of the data that contribute most, with "
        "their contributions in nats: the gain in log p if only this column had its best value. Ids and empty cells "
        "are as in scores=. The numbers are added to the table, and plots/anomalies.png is drawn",
        "false_positive_rate": "For anomalies: the share of ordinary rows that may be flagged (default: 0.01). "
        "With n validation rows, it must be at least 1 / (n + 1)",
        "false_discovery_rate": "For anomalies, instead: share of ordinary rows among the flagged rows. It is kept on "
        "average, by the procedure of Benjamini and Hochberg over the scored rows",
        "data.anomaly_label": "For anomalies: a column of data.path, 1 for known anomalies, else 0. AUROC, average "
        "precision and the measured rates are added to the table. The column is not part of a sample",
        "baselines": "true: also fits a Gaussian mixture and a kernel density estimate, for tables. They are fitted "
        "to the training rows of the run, in up to 20 s, and scored on the same rows. The mixture needs scikit-learn "
        "(pip install 'flowtrain[baselines]')",
        "sbc": "true: also compares each row with samples (simulation-based calibration), for tables. The ranks of up "
        "to 1,000 rows and the expected coverage of regions are added to the table, and plots/sbc.png is drawn",
        "sbc_samples": "For sbc=true: number of samples for each row (default: 200)",
        "plots": "true: draws all figures of the run again, as at the end of training. With new data, samples are "
        "drawn beside the new data. Without this option, only calibration and OOD are drawn",
        "report": "true: also writes report.md and report.html. The HTML file contains its figures",
        "out": "The JSON file of the evaluation (default: eval.json in the run directory). Figures and the report are "
        "written beside it, under its name. For other rows than the test set of the run, the default is "
        "eval-NAME.json, with NAME also in the names of figures and report: eval-new.json for data.path=new.csv, "
        "eval-val.json for split=val",
        "dtype": "float32 (default) or float64",
        "device": DEVICE_TEXT,
        "batch_size": "Number of rows scored at a time (default: depends on the size of a sample)",
        "dequantization_samples": "For whole numbers: noise draws averaged inside the log (default: 1). More draws "
        "give a tighter bound",
        "seed": "Seed of the noise of dequantization and of estimated traces (default: 0)",
        "trust": TRUST_TEXT,
    },
    notes=[
        "The evaluation of a run on a target gives log Z and the quality of the importance weights. data.n_test and "
        "data.seed set the samples, and keys of target can be changed. With data=NAME or data.path=FILE, the flow of "
        "the run scores data instead.",
        "Keys of data and solver can be changed, as in solver.rtol=1e-7, solver=tsit5 or data=circles. The estimate "
        "of the trace can be changed by model.eval_trace=hutchinson, model.noise and model.noise_samples. "
        "--config-dir DIR adds a folder of your own configs of data and solvers. Keys of figures: "
        "plots.format=[png,pdf,svg], plots.title=false, plots.columns=[0,2:5].",
    ],
    more=[("floweval --help solver", "keys of the solver and of the data can be changed: --help data")],
)

OWN: dict[str, Any] = {
    "ckpt": None,
    "split": None,
    "out": None,
    "scores": None,
    "grid": None,
    "grid_points": 200,
    "label": None,
    "ood": None,
    "anomalies": None,
    "false_positive_rate": None,
    "false_discovery_rate": None,
    "data.anomaly_label": None,
    "baselines": False,
    "sbc": False,
    "sbc_samples": None,
    "plots": False,
    "report": False,
    "dtype": "float32",
    "device": "auto",
    "batch_size": None,
    "dequantization_samples": 1,
    "seed": 0,
    "trust": [],
    "weights": None,
}


def main() -> None:
    """Runs the command `floweval`."""
    with messages():
        run_command("floweval", _command)


def _command() -> int:
    own, overrides = split_own(sys.argv[1:], OWN, USAGE)
    with loading():
        from flowtrain.cli.evaluate_run import run
    return run(own, overrides)
