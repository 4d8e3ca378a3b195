"""Out-of-distribution (OOD) detection: how well log p separates two sets of samples."""

import math

import torch
from torch import Tensor

from flowtrain.evaluation.result import OODDetection
from flowtrain.utils.weighting import stderr


def ood_detection(
    name: str, inside: Tensor, outside: Tensor, entropy: float, entropy_of: str, weights: Tensor | None = None
) -> OODDetection:
    """Computes the areas under the ROC curves of the scores -log p and |log p + H|, which separate two sets of samples.

    Args:
        name: the name of the other set.
        inside: log p of the set that the flow is evaluated on, (n,), float64.
        outside: log p of the other set, (m,), float64.
        entropy: H of the typicality score, in nats.
        entropy_of: the rows whose mean NLL is H.
        weights: the weights of `inside`, (n,), or None.
    """
    finite = outside.isfinite()
    kept = outside[finite]
    # a point whose log p is NaN or infinite, for example by overflow, counts as the least likely
    inside, outside = (torch.where(log_p.isfinite(), log_p, -torch.inf) for log_p in (inside, outside))
    plain, plain_error = auroc(-inside, -outside, weights)
    typical, typical_error = auroc((inside + entropy).abs(), (outside + entropy).abs(), weights)
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


def auroc(inside: Tensor, outside: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Computes the area under the receiver operating characteristic (ROC), and its standard error.

    The area is P(outside > inside) + P(outside = inside) / 2 over all pairs of scores (n,) and (m,). The area is
    computed from ranks (Mann and Whitney 1947). For the error, each score gets the fraction of scores of the other set
    that it exceeds, and the variance of these fractions is taken over both sets (DeLong et al. 1988, Comparing the
    areas under two or more correlated ROC curves). The error is NaN if a set has fewer than two scores.

    With weights of `inside` (n,), P is a weighted share, and the variance of a mean is the square of
    `flowtrain.utils.weighting.stderr`.

    Example:
        >>> area, error = auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0]))
        >>> round(area, 4)  # 5 of 6 pairs
        0.8333
    """
    below = share_below(inside, outside, weights)
    above = 1 - share_below(outside, inside)
    return float(below.mean()), math.hypot(stderr(below), stderr(above, weights))


def share_below(reference: Tensor, scores: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns for each score the fraction of `reference` below the score. Equal values count half.

    Args:
        weights: the weights of `reference`, or None.
    """
    ordered, order = reference.sort()
    left = torch.searchsorted(ordered, scores, right=False)
    right = torch.searchsorted(ordered, scores, right=True)
    if weights is None:
        return (left + right).double() / (2 * len(ordered))
    sums = torch.nn.functional.pad(weights.double()[order].cumsum(0), (1, 0))
    return (sums[left] + sums[right]) / (2 * sums[-1])
