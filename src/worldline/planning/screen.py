"""Rough rollouts of many candidates at half to a quarter of the price, to tell which are worth an exact one.

Hundreds of candidates through a GRU are matrix products and little else. Three things make them cheaper:

- The candidates of one problem run close together. What they share is computed once, in float32, along one reference
  trajectory; only their differences from it are multiplied in bfloat16, which takes half the time of float32 where the
  processor has instructions for it. So the rounding errors shrink as the search narrows.
- Of the ReLU units between (z, action) and the GRU, most are off for every candidate or on for every candidate. The
  former drop out, the latter are linear maps, which are multiplied out beforehand. Which they are is taken from the
  candidates that were seen when the reference was made; where a later candidate switches one, the unit is put back.
- Once a search is narrow, the candidates' memories differ in few directions: 2% of all after the first step, a fifth
  after the fourth. Then only their coordinates in these are multiplied, in float32, but for candidates that left them.

Shape legend: n candidates, t steps, a action, d latent, e width of the GRU, m ReLU units that are kept, da = d + a,
s = 4e sums (two gates, the new memory, the output), r directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from worldline.model.predictor import GRUPredictor
from worldline.model.world import World

Layer = Callable[[Tensor, Tensor], Tensor]
"""A linear map of its first argument, with the second as its bias."""

_BESIDE = 0.03
"""How far beside the directions a memory may lie, in root mean squares of the differences they were taken from."""
_NARROW = 0.5
"""Share of the ReLU units that may be kept for directions of the memory to be worth looking for."""
_SAMPLE = 128
"""Candidates that directions are taken from; finding them costs the third power of this."""
_TAIL = 0.003
"""Share of the memories' differences (root of the summed squares) that the directions may leave out."""


class Directions(NamedTuple):
    """Where the candidates' memories differ after a step."""

    basis: Float[Tensor, "e r"]
    offset: Float[Tensor, " r"]
    """Takes the reference off the coordinates."""
    weight: Float[Tensor, "r s"]
    beside: Float[Tensor, ""]
    """Squared distance from the directions beyond which they are no use for a memory."""


class Step(NamedTuple):
    """One step of the reference, and what to do with differences from it."""

    v: Float[Tensor, "1 da"]
    """Latent and normalised action."""
    x: Float[Tensor, "1 m"]
    h: Float[Tensor, "1 e"]
    """The memory after the step."""
    sums: Float[Tensor, " s"]
    """Before each nonlinearity, without what the memory of candidates adds to them."""
    new_h: Float[Tensor, "1 e"]
    """What the memory before the step adds to the new one."""
    after: Float[Tensor, " s"]
    """What the memory after the step adds to the next step's gates and new memory; no output yet. Zeros at the end."""
    embed: tuple[Float[Tensor, "e da"], Float[Tensor, " e"]]
    """The kept ReLU units, then the others, whose signs are such that they are off for the candidates seen."""
    same: int
    """So many values of (z, action) count for nothing, since all candidates share them or all units are kept."""
    by_x: Layer
    """From differences of the other values and of x to those of the sums."""
    rough_x: Tensor
    """The same as a matrix in bfloat16."""
    others: Int64[Tensor, " e-m"]
    """Which units the other ones are."""
    by_h: Tensor
    """From differences of the memory to those of the next gates, the next new memory and this output; bfloat16."""
    directions: Directions | None


class Seen(NamedTuple):
    """What candidates did in one step."""

    least: Float[Tensor, " e"]
    most: Float[Tensor, " e"]
    """The range of every ReLU unit's sum."""
    h: Float[Tensor, "r e"]
    """The memories of the first of them."""


class Screen:
    """Rough rollouts of a world with a GRU. The weights are those that the world has when this is made.

    Its memory is used again in every call: threads want a screen each.
    """

    def __init__(self, world: World) -> None:
        assert isinstance(world.predictor, GRUPredictor)
        predictor, cell = world.predictor, world.predictor.cell
        e = self._e = cell.hidden_size
        self._embed, self._out, self._last = (
            (layer.weight.detach(), layer.bias.detach())
            for layer in (predictor.embed[0], predictor.out[0], predictor.out[2])
            if isinstance(layer, nn.Linear)
        )
        # tanh(v) = 2 sigmoid(2 v) - 1, and a sigmoid costs a third of a tanh: the 2 goes into the weights
        twice = torch.ones(3 * e)
        twice[2 * e :] = 2.0
        self._ih = cell.weight_ih.detach() * twice[:, None], cell.bias_ih.detach() * twice
        self._hh = cell.weight_hh.detach() * twice[:, None], cell.bias_hh.detach() * twice
        out = self._out[0]  # sees (h', x)
        self._from_x = torch.cat((self._ih[0], out[:, e:])).T.contiguous()  # (e, 4e)
        self._from_h = torch.cat((self._hh[0], out[:, :e])).T.contiguous()
        self._rough_x, self._rough_h = self._from_x.bfloat16(), self._from_h.bfloat16()
        self._rough_last_h = self._rough_h[:, 3 * e :].contiguous()
        self._normalise = world.normalise_actions
        self._kept: dict[str, Tensor] = {}
        self._add_x, self._add_h = _packed(self._from_x), _packed(self._from_h)
        self._add_last_h = _packed(self._from_h[:, 3 * e :])

    def reference(
        self,
        z: Float[Tensor, " d"],
        h: Float[Tensor, " e"],
        actions: Float[Tensor, "n t a"],
        fold: bool,
        last: list[Step] | None = None,
    ) -> tuple[list[Step], Float[Tensor, "n t d"]]:
        """Return the reference of candidates like these, and the rough rollouts of these themselves.

        `fold` multiplies units out, which pays once the candidates are not too wide. `last` is the problem's reference
        so far, if it has one: the rollouts take it while the new one is made.
        """
        whole = self._trace(z, h, actions.mean(dim=0))
        if not fold:
            return whole, self.rollout(z, h, actions, whole)
        seen: list[Seen] = []
        imagined = self.rollout(z, h, actions, last or whole, seen)
        return [
            self._fold(step, what, first=step is whole[0]) for step, what in zip(whole, seen, strict=True)
        ], imagined

    def rollout(
        self,
        z: Float[Tensor, " d"],
        h: Float[Tensor, " e"],
        actions: Float[Tensor, "n t a"],
        reference: list[Step],
        seen: list[Seen] | None = None,
        exact: bool = False,
    ) -> Float[Tensor, "n t d"]:
        """Imagine candidates that begin in the reference's state: roughly, or, a few of them, in float32.

        `seen` is given what the candidates did in each step.
        """
        e, n = self._e, len(actions)
        sums, after = self._keep("sums", n, 4 * e), self._keep("after", n, 4 * e)
        x, apart = self._keep("x", n, e), self._keep("apart", n, e)
        state, z = h.expand(n, -1), z.expand(n, -1)
        imagined = []
        for step, (action, shared) in enumerate(zip(self._normalise(actions).unbind(1), reference, strict=True)):
            v = torch.cat((z, action), dim=1)
            weight, bias = shared.embed
            torch.addmm(bias, v, weight.T, out=x).relu_()
            m = shared.x.shape[1]
            parts = [(v - shared.v)[:, shared.same :], x[:, :m].sub_(shared.x)]
            switched = (x[:, m:].amax(dim=0) > 0).nonzero()[:, 0] if m < e else x.new_empty(0, dtype=torch.int64)
            if exact:
                sums = shared.by_x(torch.cat(parts, dim=1), shared.sums)
                if len(switched) > 0:
                    sums.addmm_(x[:, m + switched], self._from_x[shared.others[switched]])
            else:
                rough_x = shared.rough_x
                if len(switched) > 0:
                    parts.append(x[:, m + switched])
                    whole = self._keep("rough_x", len(rough_x) + len(switched), 4 * e, dtype=torch.bfloat16)
                    torch.index_select(self._rough_x, 0, shared.others[switched], out=whole[len(rough_x) :])
                    whole[: len(rough_x)] = rough_x
                    rough_x = whole
                differences = torch.cat(parts, dim=1, out=self._keep("differences", n, len(rough_x)))
                self._multiply(differences, rough_x, shared.sums, out=sums)
            new_h = shared.new_h
            if step > 0:  # the memory to begin with is the reference's own
                sums[:, : 2 * e].add_(after[:, : 2 * e])
                new_h = after[:, 2 * e : 3 * e]
            gates = sums[:, : 2 * e].sigmoid_()
            new = sums[:, 2 * e : 3 * e].addcmul_(gates[:, :e], new_h).sigmoid_().mul_(2.0).sub_(1.0)
            state = torch.lerp(new, state, gates[:, e:], out=self._keep("state", n, e))
            if seen is not None:
                unit = F.linear(v, *self._embed)
                seen.append(Seen(unit.amin(dim=0), unit.amax(dim=0), state[:_SAMPLE].clone()))
            torch.sub(state, shared.h, out=apart)
            last = step == len(reference) - 1
            if exact:
                after = (self._add_last_h if last else self._add_h)(apart, shared.after)
            elif shared.directions is None:
                self._multiply(apart, shared.by_h, shared.after, out=after[:, -len(shared.after) :])
            else:
                basis, offset, weight, limit = shared.directions
                coordinates = torch.addmm(offset, state, basis)
                torch.addmm(shared.after, coordinates, weight, out=after)
                squares = torch.mul(apart, apart, out=self._keep("squares", n, e))
                beside = squares.sum(dim=1) - coordinates.square().sum(dim=1)
                rows = (beside > limit).nonzero()[:, 0]
                if len(rows) > 0:
                    after[rows] = torch.add(shared.after, apart[rows].bfloat16() @ shared.by_h)
            out = sums[:, 3 * e :].add_(after[:, -e:]).relu_()
            z = z + F.linear(out, *self._last)
            imagined.append(z)
        return torch.stack(imagined, dim=1)

    def _multiply(
        self, differences: Float[Tensor, "n i"], weight: Tensor, shared: Float[Tensor, " o"], out: Float[Tensor, "n o"]
    ) -> None:
        """Write shared + differences @ weight, multiplied in bfloat16, to `out`."""
        product = self._keep("product", *out.shape, dtype=torch.bfloat16)
        torch.mm(self._keep("rough", *differences.shape, dtype=torch.bfloat16).copy_(differences), weight, out=product)
        out.copy_(product).add_(shared)

    def _keep(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return memory of an earlier call: new blocks of this size cost page faults, often more than what is done in
        them.
        """
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = torch.empty(size, dtype=dtype)
        return self._kept[name][:size].view(shape)

    def _trace(self, z: Float[Tensor, " d"], h: Float[Tensor, " e"], actions: Float[Tensor, "t a"]) -> list[Step]:
        """Imagine one trajectory in float32."""
        e, z, h = self._e, z[None], h[None]
        steps: list[Step] = []
        gh = F.linear(h, *self._hh)
        for action in self._normalise(actions)[:, None]:
            v = torch.cat((z, action), dim=1)
            x = F.linear(v, *self._embed).relu_()
            gx, new_h = F.linear(x, *self._ih), gh[:, 2 * e :]
            gates = gx[:, : 2 * e] + gh[:, : 2 * e]
            reset, update = torch.split(gates.sigmoid(), e, dim=1)
            h = torch.lerp((gx[:, 2 * e :] + reset * new_h).sigmoid_().mul_(2.0).sub_(1.0), h, update)
            out = F.linear(torch.cat((h, x), dim=1), *self._out)
            z = z + F.linear(out.relu(), *self._last)
            gh = F.linear(h, *self._hh)
            last = len(steps) == len(actions) - 1
            steps.append(
                Step(
                    v=v,
                    x=x,
                    h=h,
                    sums=torch.cat((gx[:, : 2 * e] if steps else gates, gx[:, 2 * e :], out), dim=1)[0],
                    new_h=new_h,
                    after=h.new_zeros(e) if last else torch.cat((gh, torch.zeros_like(h)), dim=1)[0],
                    embed=self._embed,
                    same=v.shape[1],
                    by_x=self._add_x,
                    rough_x=self._rough_x,
                    others=torch.empty(0, dtype=torch.int64),
                    by_h=self._rough_last_h if last else self._rough_h,
                    directions=None,
                )
            )
        return steps

    def _fold(self, step: Step, seen: Seen, first: bool) -> Step:
        """Drop the units that are off for all candidates, and multiply out those that are on for all; look for the
        directions in which the memories differ, if few units are left.
        """
        weight, bias = self._embed
        on, off = seen.least >= 0, seen.most <= 0
        mixed, others = (~(on | off)).nonzero()[:, 0], (on | off).nonzero()[:, 0]
        sign = torch.where(on, -1.0, 1.0)[others]  # relu(x) = x + relu(-x)
        same = len(self._last[1]) if first else 0  # all begin with the same latent
        if len(mixed) + weight.shape[1] - same < self._e:
            by_x = torch.cat((weight[on, same:].T @ self._from_x[on], self._from_x[mixed]))
            step = step._replace(
                x=step.x[:, mixed],
                embed=(
                    torch.cat((weight[mixed], sign[:, None] * weight[others])),
                    torch.cat((bias[mixed], sign * bias[others])),
                ),
                same=same,
                by_x=lambda x, bias: torch.addmm(bias, x, by_x),  # not worth packing
                rough_x=by_x.bfloat16(),
                others=others,
            )
        if len(mixed) < _NARROW * self._e and len(step.after) > self._e:
            step = step._replace(directions=self._directions(step, seen.h))
        return step

    def _directions(self, step: Step, h: Float[Tensor, "r e"]) -> Directions | None:
        """Return the principal directions of these memories' differences; None if there are too many to pay."""
        apart = h - step.h
        powers, mixes = torch.linalg.eigh(apart @ apart.T)  # rising
        powers = powers.clamp(min=0.0)
        left_out = powers.cumsum(dim=0) <= _TAIL**2 * powers.sum()
        r = min(int((~left_out).sum()), h.shape[1])
        if not 0 < r < 0.4 * self._e:  # float32 takes twice as long, and the coordinates come on top
            return None
        beside = _BESIDE**2 * powers.sum() / len(apart)
        basis = apart.T @ (mixes[:, -r:] / powers[-r:].sqrt())
        return Directions(basis, -(step.h @ basis)[0], basis.T @ self._from_h, beside)


def make_screen(world: World) -> Screen | None:
    """Return a screen for `world`, or None where it would not pay: no bfloat16 instructions, another predictor, or
    latents that are projected at every step.
    """
    on_cpu = world.action_mean.device.type == "cpu"
    plain = isinstance(world.predictor, GRUPredictor) and world.config.projection == "none"
    if plain and on_cpu and _multiplies_bfloat16():
        with torch.no_grad():
            return Screen(world)
    return None


def _multiplies_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


def _packed(weight: Float[Tensor, "i o"]) -> Layer:
    """Return (x, bias) -> bias + x @ weight for a few rows, which does little but read the weight: laid out for that by
    oneDNN, where torch offers it.
    """
    operators, turned = torch.ops.mkldnn, weight.T.contiguous()
    if not hasattr(operators, "_linear_pointwise"):
        return lambda x, bias: F.linear(x, turned, bias)
    packed = operators._reorder_linear_weight(turned, 16)
    return lambda x, bias: operators._linear_pointwise(x, packed, bias, "none", [], "")
