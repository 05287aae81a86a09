"""The reference pack of a dataset, as it lies on disk: what can be seen, and what actions alone can tell.

`train/references.py` makes it, `evaluate` reads it; both find its networks and its format here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, sha256_file
from worldline.core.types import WorldSpec
from worldline.model.conv import ConvEncoder
from worldline.model.factors import FactorHead, reading_quality, split_factors

DIRECTORY = "references"
CARD = "references.json"
FORMAT = 1
ACTIONS_ONLY = "actions_only.safetensors"
CANONICAL = "canonical.safetensors"
_LATENT = 128
_BATCH = 250


class CanonicalEncoder(nn.Module):
    """The convolutional encoder of the `tiny` world with a linear map to the factors, trained on them directly."""

    def __init__(self, image_size: int, outputs: int) -> None:
        super().__init__()
        self.encoder = ConvEncoder(image_size=image_size, latent_dim=_LATENT, width=16, head_channels=16)
        self.out = nn.Linear(_LATENT, outputs)

    def forward(self, frames: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b k"]:
        """Map pictures to the factors' targets."""
        x = frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        targets: Tensor = self.out(nn.functional.gelu(self.encoder(x)))
        return targets

    @torch.no_grad()
    def quality(
        self, head: FactorHead, frames: UInt8[Tensor, "m h w 3"], state: Shaped[np.ndarray, "m s"]
    ) -> dict[str, tuple[float, float | None]]:
        """Return (R^2, RMSE) of what it reads off pictures of these states, by factor; no RMSE for discrete ones."""
        readings = head.read(torch.cat([self(part) for part in torch.split(frames, _BATCH)]))
        truth = split_factors(state, head.factors)
        return {f.name: reading_quality(f, readings[f.name], truth[f.name], head.mean[f.name]) for f in head.factors}


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
    canonical: CanonicalEncoder
    image_size: int
    """Of the pictures that it sees."""
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
    image_size = card["config"]["image_size"] or spec.image_size
    canonical = CanonicalEncoder(image_size, head.size)
    canonical.load_state_dict(load_file(folder / CANONICAL))
    return References(
        sha256=sha256_file(folder / CARD),
        r2={name: factor["r2"] for name, factor in card["factors"].items()},
        rmse={name: factor["rmse"] for name, factor in card["factors"].items()},
        head=head,
        canonical=canonical.eval(),
        image_size=image_size,
        actions_only=actions_only.eval(),
    )
