"""How well likelihoods tell one set of samples from another."""

import torch
from torch import Tensor

from flowtrain.evaluation.error_budget import stderr
from flowtrain.evaluation.result import OODDetection


def ood_detection(name: str, inside: Tensor, outside: Tensor, entropy: float, entropy_of: str) -> OODDetection:
    """Areas under the ROC curves of -log p and of |log p + H| as scores that separate two sets of samples.

    Args:
        name: the name of the other set.
        inside: log p of the set that the flow is evaluated on, (n,), float64.
        outside: log p of the other set, (m,), float64.
        entropy: H of the typicality score, in nats.
        entropy_of: the rows whose mean NLL is H.
    """
    finite = outside.isfinite()
    kept = outside[finite]
    # NaN too: overflow on the way to a point is no sign of likelihood
    inside, outside = (torch.where(log_p.isfinite(), log_p, -torch.inf) for log_p in (inside, outside))
    plain, plain_error = auroc(-inside, -outside)
    typical, typical_error = auroc((inside + entropy).abs(), (outside + entropy).abs())
    return OODDetection(
        name=name,
        n=len(outside),
        infinite=int((~finite).sum()),
        nll=-float(kept.mean()),
        nll_stderr=stderr(kept),
        auroc=plain,
        auroc_stderr=plain_error,
        typicality_auroc=typical,
        typicality_stderr=typical_error,
        entropy=entropy,
        entropy_of=entropy_of,
    )


def auroc(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """P(outside > inside) + P(outside = inside) / 2 over all pairs of scores (n,) and (m,), and its standard error.

    The area under the receiver operating characteristic (Mann and Whitney 1947), by ranks. Its error is that of
    DeLong et al. 1988, Comparing the areas under two or more correlated ROC curves: from the spread of each score's
    own share, over both sets; NaN with fewer than two in either.

    Example:
        >>> area, error = auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0]))
        >>> round(area, 4)  # 5 of 6 pairs
        0.8333
    """
    below = share_below(inside, outside)
    above = 1 - share_below(outside, inside)
    error = (
        (below.var() / len(outside) + above.var() / len(inside)).sqrt() if min(len(inside), len(outside)) > 1 else None
    )
    return float(below.mean()), float("nan") if error is None else float(error)


def share_below(reference: Tensor, scores: Tensor) -> Tensor:
    """For each of `scores`, the share of `reference` below it, those equal to it counted half."""
    ordered = reference.sort().values
    left = torch.searchsorted(ordered, scores, right=False)
    right = torch.searchsorted(ordered, scores, right=True)
    return (left + right).double() / (2 * len(ordered))
