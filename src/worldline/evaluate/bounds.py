"""How much one step can amplify an error, measured along held-out rollouts, and the bound on the error, estimated.

Let s_k be the state after k real latents: z_k, and the memory that comes from them. Let s_hat_k be the imagined state,
s_hat_0 = s_0. One step F_k from s_k gives the next memory exactly and the next latent up to a residual r_{k+1}, so

    |s_hat_{k+1} - s_{k+1}| <= L_k |s_hat_k - s_k| + |r_{k+1}|,    L_k >= |DF_k| everywhere between s_k and s_hat_k

and e_h = |z_hat_h - z_h| <= sum_j |r_j| L_j ... L_{h-1}. The memory is part of the state: an error that leaves the
latent may wait in it and come back. Norm: |s|^2 = |z|^2 + scale^2 |memory|^2. Any scale gives a bound; it is set so
that the memory acts on the latent as strongly as the latent on the memory. L_k is the largest singular value of the
Jacobian at three points of the segment, by power iteration. Both err to the low side, so what comes out is an estimate
of the bound and no certificate; and it needs a step that is smooth, which one that quantises its latent is not.
docs/design/stability_driven_multimodal_system_design.md says more.

Shape legend: n windows, t steps, t1 = t + 1, q steps at which gains are split, p states, s size of a state, d latent,
a action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from worldline.core.seeding import seed_for
from worldline.model.world import State

_ALONG = (0.0, 0.5, 1.0)
_ITERATIONS = 40
_CONVERGED = 1e-3
_CHUNK = 2048
_NEIGHBOURS = 64
_TANGENT_SHARE = 0.9
_SPLIT_EVERY = 5
SPLIT = ("tangent", "tangent to off", "off to tangent", "off")

Map = Callable[[Tensor], Tensor]


@runtime_checkable
class Dynamics(Protocol):
    """What is asked of a world here: its `State` holds the latent and a memory of tensors."""

    config: Any

    def begin(self, z: Float[Tensor, "b c d"], actions: Float[Tensor, "b cm1 a"]) -> State: ...

    def step(self, state: State, action: Float[Tensor, "b a"]) -> State: ...

    def observe(self, state: State, z: Float[Tensor, "b d"]) -> State: ...


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Lengths are in units of the root mean squared distance of real latents from their mean: two drawn at random are
    about sqrt(2) apart. Column i of an array belongs to the step to h = i + 1."""

    memory_scale: float
    residual: Float64[np.ndarray, "n t"]
    """|r_h|: one-step error from the true past."""
    gain: Float64[np.ndarray, "n t"]
    """L_{h-1}."""
    gain_seen: Float64[np.ndarray, "n t"]
    """What the step really did to the error, without the residual; NaN where there was no error yet."""
    error: Float64[np.ndarray, "n t"]
    """e_h of the latent."""
    bound: Float64[np.ndarray, "n t"]
    split_at: list[int]
    split: dict[str, Float64[np.ndarray, "n q"]]
    """Gains of the latent's own block of the Jacobian at real states, between tangent space and its complement."""
    tangent_dim: float
    """Mean dimension of the tangent spaces."""
    unconverged: float
    """Largest relative change of a gain in its last iteration. It tells of slow convergence and bounds nothing: power
    iteration approaches the gain from below."""

    def to_figures(self) -> dict[str, Any]:
        """Return raw arrays and what they come to, as JSON."""
        useful = np.flatnonzero(np.median(self.bound, axis=0) > np.sqrt(2))
        asked = np.isfinite(self.gain_seen)
        return {
            "memory_scale": _rounded(self.memory_scale),
            "held": float((self.error <= self.bound * (1 + 1e-6)).mean()),
            "gain_held": float((self.gain_seen <= self.gain * (1 + 1e-6))[asked].mean()) if asked.any() else None,
            "says_something_up_to": int(useful[0]) if len(useful) else self.bound.shape[1],
            "unconverged": _rounded(self.unconverged),
            "tangent_dim": _rounded(self.tangent_dim),
            "residual": _rounded(self.residual),
            "gain": _rounded(self.gain),
            "gain_seen": _rounded(self.gain_seen),
            "error": _rounded(self.error),
            "bound": _rounded(self.bound),
            "split_at": self.split_at,
            "split": {name: _rounded(values) for name, values in self.split.items()},
        }


@torch.no_grad()
def measure_bound(
    world: Dynamics,
    context: Float32[np.ndarray, "n c d"],
    past: Float32[np.ndarray, "n cm1 a"],
    actions: Float32[np.ndarray, "n t a"],
    real: Float32[np.ndarray, "n t1 d"],
    train: Float32[np.ndarray, "m d"],
    seed: int = 0,
) -> Bound:
    """Measure residuals and gains on windows of held-out episodes. `train` are real latents: they span the manifold."""
    unit = float(np.sqrt(np.square(train - train.mean(axis=0)).sum(axis=-1).mean()))
    acts = torch.from_numpy(actions)
    truth = torch.from_numpy(real.copy())
    kept = world.config.context
    before = torch.from_numpy(past[:, past.shape[1] - kept + 1 :].copy())
    state = world.begin(torch.from_numpy(context[:, -kept:].copy()), before)
    states, imagined = [state], [state]
    residuals = []
    for k in range(actions.shape[1]):
        ahead = world.step(states[-1], acts[:, k])
        residuals.append(ahead.z - truth[:, k + 1])
        states.append(world.observe(ahead, truth[:, k + 1]))
        imagined.append(world.step(imagined[-1], acts[:, k]))
    steps, windows = len(residuals), len(actions)

    # states of all steps as one batch, step after step
    flow = _Flow(world, _concatenated(states[:-1]), acts.transpose(0, 1).flatten(0, 1))
    flow.scale = _balanced_scale(flow, seed)
    now, now_hat = flow.pack(_concatenated(states[:-1])), flow.pack(_concatenated(imagined[:-1]))
    after, after_hat = flow.pack(_concatenated(states[1:])), flow.pack(_concatenated(imagined[1:]))
    residual = torch.cat(residuals)
    offset = now_hat - now
    reachable = (offset != 0).any(dim=0)  # actions in a memory, for example, are never in error
    if not reachable.any():
        reachable[:] = True
    gains, changes = zip(
        *(flow.gain(now + share * offset, keep=lambda v: v * reachable, seed=seed) for share in _ALONG), strict=True
    )
    gain = torch.stack(gains).amax(dim=0)
    # the step alone: what it made of the error, before the residual that it added
    stepped = after_hat - after
    stepped[:, : residual.shape[1]] -= residual
    seen = stepped.norm(dim=-1) / offset.norm(dim=-1)

    def by_window(values: Tensor) -> Float64[np.ndarray, "n t"]:
        return values.double().reshape(steps, windows).T.numpy()

    length, gain_by_window = by_window(residual.norm(dim=-1)) / unit, by_window(gain)
    at = list(range(0, steps, _SPLIT_EVERY))
    split, dim = _split(flow, states, at, torch.from_numpy(train), windows, seed)
    return Bound(
        memory_scale=flow.scale,
        residual=length,
        gain=gain_by_window,
        gain_seen=np.where(by_window(offset.norm(dim=-1)) > 0, by_window(seen), np.nan),
        error=by_window((after_hat - after)[:, : residual.shape[1]].norm(dim=-1)) / unit,
        bound=error_bound(length, gain_by_window),
        split_at=[k + 1 for k in at],
        split=split,
        tangent_dim=dim,
        unconverged=max(changes),
    )


def error_bound(residual: Float64[np.ndarray, "n t"], gain: Float64[np.ndarray, "n t"]) -> Float64[np.ndarray, "n t"]:
    """Return E_h = L_{h-1} E_{h-1} + |r_h| from E_0 = 0: residuals times the products of the gains after them."""
    bound, rows = np.zeros(len(residual)), []
    for r, gain_k in zip(residual.T, gain.T, strict=True):
        bound = gain_k * bound + r
        rows.append(bound)
    return np.stack(rows, axis=1)


def largest_gain(
    step: Map, s: Float[Tensor, "p s"], *, keep: Map = lambda v: v, keep_out: Map = lambda v: v, seed: int = 0
) -> tuple[Float[Tensor, " p"], float]:
    """Return |Q J P| of each row's Jacobian J by power iteration on (Q J P)^T (Q J P), P = `keep` and Q = `keep_out`.

    `step` maps rows independently. The second value is the largest relative change in the last iteration.
    """
    generator = torch.Generator().manual_seed(seed_for("largest-gain", seed) % 2**63)
    v = _unit(keep(torch.randn(s.shape, generator=generator)))
    gain = torch.zeros(len(s))
    # attention has second derivatives in its plain form only
    with sdpa_kernel(SDPBackend.MATH):
        after, pull = vjp(step, s)[:2]  # u -> J^T u, which is linear, so that its own transpose is v -> J v
        push = vjp(lambda u: pull(u)[0], torch.zeros_like(after))[1]
        for _ in range(_ITERATIONS):
            w = keep_out(push(v)[0])
            before, gain = gain, w.norm(dim=-1)
            # projected twice: where the gain is all but 0 the first projection leaves rounding errors, grown by _unit
            v = _unit(keep(_unit(keep(pull(keep_out(w))[0]))))
            change = float(((gain - before).abs() / gain.clamp(min=1e-6)).max())
            if change < _CONVERGED:
                break
    return gain, change


class _Flow:
    """One step of a world as a map of vectors: the latent, then the memory times `scale`, a row for each state."""

    def __init__(self, world: Dynamics, like: State, actions: Float[Tensor, "p a"]) -> None:
        self.world, self.like, self.actions = world, like, actions
        self.scale = 1.0

    def pack(self, state: State) -> Float[Tensor, "p s"]:
        parts = [part.flatten(1) * self.scale for part in state.memory if part.is_floating_point()]
        return torch.cat([state.z, *parts], dim=1)

    def unpack(self, s: Float[Tensor, "p s"], rows: slice) -> State:
        at, memory = self.like.z.shape[1], []
        for part in self.like.memory:
            if part.is_floating_point():
                size = part[0].numel()
                memory.append((s[:, at : at + size] / self.scale).reshape(len(s), *part.shape[1:]))
                at += size
            else:  # which entries are real, for example: the same in both trajectories
                memory.append(part[rows])
        return State(s[:, : self.like.z.shape[1]], tuple(memory))

    def gain(
        self, s: Float[Tensor, "p s"], *, keep: Map, keep_out: Map = lambda v: v, seed: int = 0
    ) -> tuple[Float[Tensor, " p"], float]:
        """Return the largest gain at each state. `keep` and `keep_out` are the same for all of them."""
        gains, changes = [], []
        for first in range(0, len(s), _CHUNK):
            rows = slice(first, first + _CHUNK)
            found, change = largest_gain(self.step(rows), s[rows], keep=keep, keep_out=keep_out, seed=seed)
            gains.append(found)
            changes.append(change)
        return torch.cat(gains), max(changes)

    def step(self, rows: slice) -> Map:
        return lambda s: self.pack(self.world.step(self.unpack(s, rows), self.actions[rows]))


def _balanced_scale(flow: _Flow, seed: int) -> float:
    """Return the scale of the memory at which it acts on the latent as strongly as the latent acts on it."""
    s = flow.pack(flow.like)
    latent = torch.arange(s.shape[1]) < flow.like.z.shape[1]
    if latent.all():
        return 1.0
    rows = slice(None, None, max(len(s) // 64, 1))
    on_latent, _ = largest_gain(flow.step(rows), s[rows], keep=lambda v: v * ~latent, keep_out=lambda v: v * latent)
    on_memory, _ = largest_gain(flow.step(rows), s[rows], keep=lambda v: v * latent, keep_out=lambda v: v * ~latent)
    ratio = on_latent.clamp(min=1e-6).log().mean() - on_memory.clamp(min=1e-6).log().mean()
    return float((ratio / 2).exp())


def _split(
    flow: _Flow, states: list[State], at: list[int], train: Float[Tensor, "m d"], windows: int, seed: int
) -> tuple[dict[str, Float64[np.ndarray, "n q"]], float]:
    """Return the gains of z -> z' between tangent spaces and their complements, memory held, at steps `at`."""
    spaces = {k: tangent_spaces(states[k].z, train) for k in sorted({j for k in at for j in (k, k + 1)})}
    found: dict[str, list[Tensor]] = {name: [] for name in SPLIT}
    for k in at:
        state, rows = states[k], slice(k * windows, (k + 1) * windows)

        def latent_step(z: Tensor, state: State = state, rows: slice = rows) -> Tensor:
            return flow.world.step(State(z, state.memory), flow.actions[rows]).z

        into, out_of = _projections(spaces[k + 1]), _projections(spaces[k])
        for name, source, target in (
            ("tangent", 0, 0),
            ("tangent to off", 0, 1),
            ("off to tangent", 1, 0),
            ("off", 1, 1),
        ):
            gain, _ = largest_gain(latent_step, state.z, keep=out_of[source], keep_out=into[target], seed=seed)
            found[name].append(gain)
    dims = torch.stack([space.diagonal(dim1=1, dim2=2).sum(dim=1) for space in spaces.values()])
    return {name: torch.stack(gains, dim=1).double().numpy() for name, gains in found.items()}, float(dims.mean())


def tangent_spaces(z: Float[Tensor, "p d"], train: Float[Tensor, "m d"]) -> Float[Tensor, "p d d"]:
    """Return at each latent the projection on the space in which real latents vary near it.

    That is: of the 64 nearest training latents, the leading principal directions that hold 90% of their variance.
    """
    nearest = torch.cdist(z, train).topk(min(_NEIGHBOURS, len(train)), largest=False).indices
    near = train[nearest]  # (p, 64, d)
    _, sizes, directions = torch.linalg.svd(near - near.mean(dim=1, keepdim=True), full_matrices=False)
    share = sizes.square().cumsum(dim=1) / sizes.square().sum(dim=1, keepdim=True).clamp(min=1e-30)
    needed = torch.cat((torch.ones_like(share[:, :1]), (share[:, :-1] < _TANGENT_SHARE).float()), dim=1)
    leading = directions * needed[:, :, None]
    space: Tensor = leading.transpose(1, 2) @ leading
    return space


def _projections(space: Float[Tensor, "p d d"]) -> tuple[Map, Map]:
    def tangent(v: Tensor) -> Tensor:
        return torch.einsum("pde,pe->pd", space, v)

    return tangent, lambda v: v - tangent(v)


def _unit(v: Float[Tensor, "p s"]) -> Float[Tensor, "p s"]:
    unit: Tensor = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return unit


def _concatenated(states: list[State]) -> State:
    memory = zip(*(state.memory for state in states), strict=True)
    return State(torch.cat([state.z for state in states]), tuple(torch.cat(parts) for parts in memory))


def _rounded(values: Any) -> Any:
    """Return five significant digits, None for what is not defined."""
    if isinstance(values, np.ndarray):
        return [_rounded(value) for value in values.tolist()]
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.5g}") if np.isfinite(values) else None
