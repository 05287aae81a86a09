"""The reference pack of a dataset, as it lies on disk: what can be seen, and what actions alone can tell.

`train/references.py` makes it, `evaluate` reads it; both find its networks and its format here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, sha256_file
from worldline.core.types import WorldSpec
from worldline.model.factors import FactorHead

DIRECTORY = "references"
CARD = "references.json"
FORMAT = 1
ACTIONS_ONLY = "actions_only.safetensors"
CANONICAL = "canonical.safetensors"


class ActionsOnly(nn.Module):
    """A small GRU that forecasts factors from a window's actions alone: no frames, no past."""

    action_mean: Tensor
    action_scale: Tensor

    def __init__(self, action_dim: int, outputs: int, hidden: int = 64) -> None:
        super().__init__()
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_scale", torch.ones(action_dim))
        self.gru = nn.GRU(action_dim, hidden, batch_first=True)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t1 k"]:
        """Return targets of h = 0 ... t; the forecast at h has seen actions[:, :h]."""
        hidden, _ = self.gru((actions - self.action_mean) / self.action_scale)
        start = hidden.new_zeros(len(hidden), 1, hidden.shape[-1])
        forecast: Tensor = self.out(torch.cat([start, hidden], dim=1))
        return forecast


@dataclass(frozen=True, kw_only=True)
class References:
    """A dataset's reference pack, loaded."""

    sha256: str
    """Hash of the card, which holds the hashes of all other files."""
    r2: dict[str, float]
    """Held-out R^2 of the canonical supervised encoder, by factor."""
    rmse: dict[str, float | None]
    """Its held-out RMSE in native units; None for discrete factors."""
    head: FactorHead
    actions_only: ActionsOnly


def load_references(dataset: str | Path, fingerprint: str, spec: WorldSpec) -> References:
    """Load the reference pack of a dataset.

    Raises:
        WorldlineError: there is none, it belongs to other data, or a file has changed.
    """
    folder = Path(dataset) / DIRECTORY
    remedy = f"make it with: worldline references {dataset}"
    if not (folder / CARD).exists():
        raise WorldlineError(f"{folder}: expected the dataset's reference pack, found none; {remedy}")
    card = read_json(folder / CARD)
    if card.get("format") != FORMAT or card.get("fingerprint") != fingerprint:
        raise WorldlineError(f"{folder}: the reference pack belongs to other data or another version; {remedy}")
    for name, expected in card["files"].items():
        if not (folder / name).exists() or sha256_file(folder / name) != expected:
            raise WorldlineError(f"{folder / name}: missing or changed since the pack was made; {remedy}")
    head = FactorHead.from_json(spec.factors, card["head"])
    actions_only = ActionsOnly(spec.action_dim, head.size, card["actions_only"]["hidden"])
    actions_only.load_state_dict(load_file(folder / ACTIONS_ONLY))
    return References(
        sha256=sha256_file(folder / CARD),
        r2={name: factor["r2"] for name, factor in card["factors"].items()},
        rmse={name: factor["rmse"] for name, factor in card["factors"].items()},
        head=head,
        actions_only=actions_only.eval(),
    )
