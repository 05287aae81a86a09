"""Action-conditioned predictors that carry what they need from step to step.

Shape legend: b batch, t steps, d latent, a action, e width, k window.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from worldline.model.transformer import ConditionedBlock

Memory = tuple[Tensor, ...]


class Predictor(Protocol):
    """What a world asks of its dynamics. Actions come normalised."""

    def initial(self, batch: int) -> Memory:
        """Return the memory of a past that knows nothing, batch first."""
        ...

    def advance(
        self, z: Float[Tensor, "b d"], action: Float[Tensor, "b a"], memory: Memory
    ) -> tuple[Float[Tensor, "b d"], Memory]:
        """Predict the next latent, and return the memory that now includes (z, action)."""
        ...

    def teacher_forced(self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t d"]:
        """Predict each next latent from the true ones so far: equal to `advance` from `initial`, but in one go."""
        ...


class GRUPredictor(nn.Module):
    """z_hat = z + out(h', x) with x = in(z, a) and h' = GRU(x, h). Memory: h, (b, e)."""

    def __init__(self, *, latent_dim: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(latent_dim + action_dim, hidden), nn.ReLU())
        self.cell = nn.GRUCell(hidden, hidden)
        self.out = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
        _start_still(self.out[-1])

    def initial(self, batch: int) -> Memory:
        return (self.cell.weight_hh.new_zeros(batch, self.cell.hidden_size),)

    def advance(
        self, z: Float[Tensor, "b d"], action: Float[Tensor, "b a"], memory: Memory
    ) -> tuple[Float[Tensor, "b d"], Memory]:
        x = self.embed(torch.cat((z, action), dim=-1))
        h = self.cell(x, memory[0])
        return z + self.out(torch.cat((h, x), dim=-1)), (h,)

    def teacher_forced(
        self,
        z: Float[Tensor, "b t d"],
        actions: Float[Tensor, "b t a"],
        valid: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Predict each next latent; steps that are not `valid` leave no trace in the memory."""
        x = self.embed(torch.cat((z, actions), dim=-1))  # (b, t, e)
        (h,) = self.initial(len(z))
        hs = []
        for i, x_t in enumerate(x.unbind(1)):
            h_next = self.cell(x_t, h)
            h = h_next if valid is None else torch.where(valid[:, i, None], h_next, h)
            hs.append(h)
        change: Tensor = self.out(torch.cat((torch.stack(hs, dim=1), x), dim=-1))
        return z + change


class _WindowPredictor(nn.Module):
    """A predictor that sees the last `window` latents and actions, and begins anew from them at every step.

    Memory: past latents (b, k-1, d), past actions (b, k-1, a), and which of them are real (b, k-1), newest last.
    """

    def __init__(self, *, latent_dim: int, action_dim: int, window: int) -> None:
        super().__init__()
        self._latent_dim, self._action_dim, self._window = latent_dim, action_dim, window

    def initial(self, batch: int) -> Memory:
        past, like = self._window - 1, next(self.parameters())
        return (
            like.new_zeros(batch, past, self._latent_dim),
            like.new_zeros(batch, past, self._action_dim),
            torch.zeros(batch, past, dtype=torch.bool, device=like.device),
        )

    def advance(
        self, z: Float[Tensor, "b d"], action: Float[Tensor, "b a"], memory: Memory
    ) -> tuple[Float[Tensor, "b d"], Memory]:
        zs = torch.cat((memory[0], z[:, None]), dim=1)  # (b, k, d)
        actions = torch.cat((memory[1], action[:, None]), dim=1)
        valid = F.pad(memory[2], (0, 1), value=True)
        return self._predict(zs, actions, valid)[:, -1], (zs[:, 1:], actions[:, 1:], valid[:, 1:])

    def teacher_forced(self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t d"]:
        b, t, _ = z.shape
        k = self._window
        if t <= k:
            return self._predict(z, actions, torch.ones(b, t, dtype=torch.bool, device=z.device))
        # beyond the first window every step sees exactly k tokens: one batch row for each
        head = self._predict(z[:, :k], actions[:, :k], torch.ones(b, k, dtype=torch.bool, device=z.device))
        zs = z[:, 1:].unfold(1, k, 1).transpose(2, 3).flatten(0, 1)  # (b (t-k), k, d)
        acts = actions[:, 1:].unfold(1, k, 1).transpose(2, 3).flatten(0, 1)
        tail = self._predict(zs, acts, torch.ones(len(zs), k, dtype=torch.bool, device=z.device))[:, -1]
        return torch.cat((head, tail.reshape(b, t - k, -1)), dim=1)

    def _predict(
        self, z: Float[Tensor, "b n d"], actions: Float[Tensor, "b n a"], valid: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        """Predict the successor of every token from it and the valid ones before it."""
        raise NotImplementedError


class WindowedGRUPredictor(_WindowPredictor):
    """The GRU, as it is trained on short windows: never with a memory older than `window` steps."""

    def __init__(self, *, latent_dim: int, action_dim: int, hidden: int, window: int) -> None:
        super().__init__(latent_dim=latent_dim, action_dim=action_dim, window=window)
        self.gru = GRUPredictor(latent_dim=latent_dim, action_dim=action_dim, hidden=hidden)

    def _predict(
        self, z: Float[Tensor, "b n d"], actions: Float[Tensor, "b n a"], valid: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        return self.gru.teacher_forced(z, actions, valid)


class TransformerPredictor(_WindowPredictor):
    """A causal transformer over the last `window` latents, each block conditioned on the actions (AdaLN-zero)."""

    def __init__(self, *, latent_dim: int, action_dim: int, width: int, depth: int, heads: int, window: int) -> None:
        super().__init__(latent_dim=latent_dim, action_dim=action_dim, window=window)
        self.embed = nn.Linear(latent_dim, width)
        self.embed_action = nn.Sequential(nn.Linear(action_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(ConditionedBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, latent_dim)
        _start_still(self.out)

    def _predict(
        self, z: Float[Tensor, "b n d"], actions: Float[Tensor, "b n a"], valid: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        n = z.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=z.device).tril()
        itself = torch.eye(n, dtype=torch.bool, device=z.device)  # a row without any key would be NaN
        mask = (causal & valid[:, None, :] | itself)[:, None]  # (b, 1, n, n)
        x, condition = self.embed(z), self.embed_action(actions)
        for block in self.blocks:
            x = block(x, condition, mask)
        change: Tensor = self.out(self.norm(x))
        return z + change


def _start_still(layer: nn.Module) -> None:
    """Scale a residual's last layer down, so that an untrained model predicts that little changes."""
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
