"""Evaluation of flows: likelihoods with an error budget, checks of the density, calibration, OOD and anomalies."""

from flowtrain.evaluation.anomalies import Anomalies, find_anomalies
from flowtrain.evaluation.error_budget import rows_of_checks
from flowtrain.evaluation.evaluate import check_fits, evaluate, roundtrip_error
from flowtrain.evaluation.result import NAMES, Budget, Calibration, Check, Evaluation, OODDetection

__all__ = [
    "NAMES",
    "Anomalies",
    "Budget",
    "Calibration",
    "Check",
    "Evaluation",
    "OODDetection",
    "check_fits",
    "evaluate",
    "find_anomalies",
    "roundtrip_error",
    "rows_of_checks",
]
