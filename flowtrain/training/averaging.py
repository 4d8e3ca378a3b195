"""Data parallelism: averages the gradient over the rows of all ranks, in one collective."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowtrain import distributed

# numbers kept for a loss and its terms in what is summed, so that a rank whose step failed sends as many as the others
SLOTS = 16


def averaged(
    parameters: Sequence[nn.Parameter], terms: Mapping[str, Tensor], weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Puts sum_r w_r g_r, over all ranks, in the place of this rank's gradients, where that is finite.

    Gradients and terms travel as one tensor and are summed once all of them are there, so that a rank whose step has
    failed, forward or backward, takes part with NaN in the place of its own: then no rank has an update to make, and
    each has its own gradients still, to tell whether it was its fault.

    A parameter without a gradient on every rank stays without one, so that weight decay and the optimizer's averages
    do not change it. If only some ranks have a gradient, the others count as zeros.

    Args:
        terms: the loss and its parts, by name, the same on all ranks; none where the step failed.
        weight: w_r, the share of the rows of the batch that this rank has.

    Returns:
        (the norm of the mean gradient, NaN or infinite where it is of no use; the weighted terms). On one rank, those
        of its own, and nothing is copied.
    """
    trained = [p for p in parameters if p.requires_grad]
    if distributed.size() == 1:
        return nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]), dict(terms)
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    slots = pieces[0].new_full((SLOTS,), 0.0 if terms else torch.nan)
    for i, term in enumerate(terms.values()):
        slots[i] = term
    # 1 for each parameter with a gradient. The sum over ranks is above 0 if any rank has one. Needs no device sync
    known = pieces[0].new_ones(len(trained))
    for i, p in enumerate(trained):
        if p.grad is None:
            known[i] = 0.0
    flat = torch.cat([*(piece.flatten() for piece in pieces), known, slots]).mul_(weight)
    if not terms:
        flat.fill_(torch.nan)
    distributed.sum_in_place(flat)
    sizes = [p.numel() for p in trained]
    gradient, known, means = torch.split(flat, [sum(sizes), len(trained), SLOTS])
    norm = torch.linalg.vector_norm(gradient)
    found = dict(zip(terms, means, strict=False))
    # one wait for the device, which the caller's check would come to anyway
    finite, *there = torch.cat([norm.isfinite().view(1), known > 0]).tolist()
    if finite:
        for p, piece, has in zip(trained, torch.split(gradient, sizes), there, strict=True):
            # in the layout of the parameter: a fused optimizer goes through the memory of both side by side
            p.grad = torch.empty_like(p).copy_(piece.view_as(p)) if has else None
    return norm, found
