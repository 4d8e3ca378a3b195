"""Evaluation of flows: likelihoods with an error budget, checks of the density, calibration, OOD and anomalies."""

from flowtrain.evaluation.anomalies import Anomalies, find_anomalies
from flowtrain.evaluation.error_budget import rows_of_checks
from flowtrain.evaluation.evaluate import check_fits, evaluate, roundtrip_error
from flowtrain.evaluation.result import NAMES, Budget, Calibration, Check, Evaluation, OODDetection
from flowtrain.evaluation.target_result import TargetEvaluation
from flowtrain.evaluation.targets import evaluate_target

__all__ = [
    "NAMES",
    "Anomalies",
    "Budget",
    "Calibration",
    "Check",
    "Evaluation",
    "OODDetection",
    "TargetEvaluation",
    "check_fits",
    "evaluate",
    "evaluate_target",
    "find_anomalies",
    "roundtrip_error",
    "rows_of_checks",
]
