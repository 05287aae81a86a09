"""How far a latent is from a goal's, for a planner: in what a latent's directions change while a plan is carried out.

Neither plain nor whitened latents order states by how far they are from a goal. Whitening lifts the many directions
that hold fine detail of a picture, and in which any two states differ, to the few that say where things are.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Distance = Literal["change", "white", "plain"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)

_RIDGE = 0.05
"""Share of its variance by which every direction changes at least, so that what never changes in an episode does not
count for everything: there an imagined latent differs from the goal by its own errors alone."""


def change_matrix(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> Float[Tensor, "d r"]:
    """Return M such that |M^T (z - g)|^2 measures by the changes from `before` to `after`, real latents of the same
    episodes some steps apart.

    In whitened latents and the eigenvectors of E[dz dz^T], dz = after - before, with its eigenvalues s, a direction
    counts 1 / (s + ridge)^2: slow ones much, as in slow feature analysis (Wiskott and Sejnowski, 2002), by the weights
    of the biharmonic distance (Lipman, Rustamov and Funkhouser, 2010), s standing for its eigenvalues of the Laplacian.
    Any invertible linear map of the latents leaves it as it is. Directions without variance count nothing.
    """
    centred = before.double() - before.double().mean(dim=0)
    size, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    alive = size > 1e-7 * size[-1]
    white = directions[:, alive] * size[alive].rsqrt()
    change = (after.double() - before.double()) @ white
    share, mix = torch.linalg.eigh(change.T @ change / len(change))
    matrix: Tensor = white @ mix / (share + _RIDGE)
    return matrix.to(before.dtype)
