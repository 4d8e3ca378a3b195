"""Model families. Each function builds an untrained flow for a shape of samples.

The functions have the names of their modules. `flowtrain.models.realnvp` is the function. To import from the module,
write `from flowtrain.models.realnvp import Couplings`.

Example:
    >>> realnvp(2).sample(3).shape, glow((1, 8, 8)).sample(3).shape
    (torch.Size([3, 2]), torch.Size([3, 1, 8, 8]))
"""

from flowtrain.models.affine import affine as affine
from flowtrain.models.ffjord import ffjord as ffjord
from flowtrain.models.glow import glow as glow
from flowtrain.models.maf import maf as maf
from flowtrain.models.mixture import mixture as mixture
from flowtrain.models.nsf import nsf as nsf
from flowtrain.models.realnvp import realnvp as realnvp

__all__ = ["affine", "ffjord", "glow", "maf", "mixture", "nsf", "realnvp"]
