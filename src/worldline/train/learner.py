"""What an update of masked pre-training computes: predicted features of hidden tubelets against a target's.

Shape legend: b clips, n tokens of a clip, k kept, m hidden, e width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from worldline.core.errors import require_at_least
from worldline.core.seeding import seed_for
from worldline.model.video import MaskedVideo, VideoConfig
from worldline.train.feed import Batch
from worldline.train.losses import sigreg, warmup_cosine
from worldline.train.masks import MaskConfig, masks
from worldline.train.parallel import ParallelConfig, Ranks, follow, parallelize, synchronise_gradients
from worldline.train.shards import Shards


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The optimisation of a masked pre-training."""

    steps: int = 10_000
    """Updates."""
    target: Literal["ema", "sigreg"] = "ema"
    """What is predicted: features of an averaged encoder (V-JEPA), or the encoder's own, held apart by SIGReg
    (LeJEPA)."""
    ema: float = 0.998
    """What the averaged encoder keeps of itself an update; rises evenly to 1 at the last."""
    sigreg: float = 0.05
    """Weight of SIGReg (target=sigreg only), whose statistic grows with the clips of a batch: 1 at 16 clips pulls
    like 0.05 at 320."""
    places: int = 16
    """Places, drawn anew each time, at each of which SIGReg holds the clips' features apart."""
    projections: int = 256
    """Directions that SIGReg looks along."""
    lr: float = 1e-3
    """Highest learning rate."""
    lr_end: float = 0.01
    """The last learning rate over the highest; half a cosine leads there."""
    warmup: int = 200
    """Updates in which the learning rate rises."""
    weight_decay: float = 0.04
    """Of matrices; norms and biases are not decayed."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    bfloat16: bool = True
    """Compute in bfloat16; weights, optimiser and sums over ranks stay float32."""

    def __post_init__(self) -> None:
        require_at_least(self, {"steps": 1, "warmup": 0, "places": 1, "projections": 1}, "learner.")


def first_weights(model: VideoConfig, seed: int) -> MaskedVideo:
    """Return the model that a pre-training with this seed begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights"))
        return MaskedVideo(model)


class Learner:
    """Model, target and optimiser, spread over the ranks."""

    def __init__(
        self,
        model: VideoConfig,
        mask: MaskConfig,
        config: LearnerConfig,
        parallel: ParallelConfig,
        ranks: Ranks,
        *,
        seed: int,
        device: str,
    ) -> None:
        self.config, self._mask, self._parallel, self._grid = config, mask, parallel, model.grid
        self._seed, self._device = seed, device
        whole = first_weights(model, seed)  # every rank makes all weights and keeps its part
        averaged = first_weights(model, seed).encoder.requires_grad_(False) if config.target == "ema" else None
        self.num_parameters = sum(p.numel() for p in whole.parameters())

        def spread(module: nn.Module) -> nn.Module:
            return parallelize(module, ranks.mesh, parallel, device=device, bfloat16=config.bfloat16)

        self.model = spread(whole)
        self.target = None if averaged is None else spread(averaged)
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)

    @property
    def kept_encoder(self) -> nn.Module:
        """The encoder that a finished run hands over: the averaged one where there is one."""
        return self._encoder if self.target is None else self.target

    @property
    def _encoder(self) -> nn.Module:
        return self.model.get_submodule("encoder")

    def update(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Do one update; return this rank's loss and the gradient's norm over all ranks, before clipping."""
        config, step = self.config, batch.step
        factor = warmup_cosine(step, steps=config.steps, warmup=config.warmup, end=config.lr_end)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor
        loss = self.gradients(batch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.target is not None:
            decay = 1.0 - (1.0 - config.ema) * (1.0 - step / config.steps)
            follow(self.target, self._encoder, decay)
        return loss, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def gradients(self, batch: Batch) -> Tensor:
        """Add up gradients of the mean loss over the clips of all ranks; return this rank's mean loss."""
        kinds = len(self._mask.block)
        places = [masks(self._mask, kind, self._grid, batch.ids, batch.step, self._seed) for kind in range(kinds)]
        total = torch.zeros((), device=self._device)
        parts = np.array_split(np.arange(len(batch.ids)), self._parallel.accumulate)
        for part in parts:
            rows = slice(int(part[0]), int(part[-1]) + 1)
            clips, weight = batch.clips[rows], batch.weight[rows]
            features = self._target_features(clips)
            for kind, (kept, hidden) in enumerate(places):
                synchronise_gradients(self.model, part is parts[-1] and kind + 1 == kinds)
                seen, told = (torch.from_numpy(place[rows]).to(self._device) for place in (kept, hidden))
                loss = self._loss(clips, weight, seen, told, features, (batch.step, kind))
                share = loss * len(part) / (len(batch.ids) * kinds)
                torch.autograd.backward(share)
                total += share.detach()
        return total

    def save(self, shards: Shards, step: int) -> None:
        shards.save(step, self._parts(), self.optimizer)

    def restore(self, shards: Shards) -> int:
        """Go back to the last checkpoint; return its step, 0 without one."""
        return shards.load(self._parts(), self.optimizer)

    def _parts(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({} if self.target is None else {"target": self.target})

    @torch.no_grad()
    def _target_features(self, clips: Tensor) -> Tensor | None:
        if self.target is None:
            return None
        with torch.autocast(self._device, torch.bfloat16, enabled=self.config.bfloat16):
            features = self.target(clips)
        return F.layer_norm(features.float(), features.shape[-1:])

    def _loss(
        self,
        clips: Tensor,
        weight: Float[Tensor, " b"],
        kept: Int64[Tensor, "b k"],
        hidden: Int64[Tensor, "b m"],
        features: Float[Tensor, "b n e"] | None,
        key: tuple[int, int],
    ) -> Float[Tensor, ""]:
        """Return the mean over clips of |told - target| over hidden tokens; a lost clip counts as 0.

        Source: V-JEPA, arXiv 2404.08471, eq. 1; with SIGReg squared, as LeJEPA, arXiv 2511.08544.
        """
        with torch.autocast(self._device, torch.bfloat16, enabled=self.config.bfloat16):
            told, own = self.model(clips, kept, hidden, features is None)
        target = (own if features is None else features).float()
        gap = told.float() - target.gather(1, hidden[..., None].expand(-1, -1, target.shape[-1]))
        if features is not None:
            error: Tensor = (gap.abs().mean(dim=(1, 2)) * weight).mean()
            return error
        prediction: Tensor = (gap.square().mean(dim=(1, 2)) * weight).mean()
        generator = torch.Generator().manual_seed(seed_for(self._seed, "sigreg", *key))
        # place by place: over all places together, features that tell nothing but their place would pass
        places = torch.randperm(target.shape[1], generator=generator)[: self.config.places].to(target.device)
        spread = sigreg(target[:, places].transpose(0, 1), generator, projections=self.config.projections)
        return prediction + self.config.sigreg * spread
