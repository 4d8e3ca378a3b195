"""Posteriors of logistic regressions by reverse KL, compared with long runs of NumPyro's NUTS on scikit-learn's data."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import datasets

from flowtrain.data.targets.regression import read_classes
from flowtrain.runs.run import train

pytestmark = pytest.mark.slow

# settings of the flow for each data set, as in flowtrain/data/README.md
SETTINGS = {
    "wine": {"model.layers": 2, "model.bins": 8, "trainer.steps": 1000},
    "breast_cancer": {"model.layers": 2, "model.bins": 8, "trainer.steps": 2000},
}
