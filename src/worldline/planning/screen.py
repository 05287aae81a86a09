"""Rough rollouts of many candidates at less than half the price, to tell which of them are worth an exact one.

Three hundred candidates through a GRU are matrix products and little else. Two things make them cheaper:

- The candidates of one problem run close together. What they share is computed once, in float32, along one reference
  trajectory; only their differences from it are multiplied in bfloat16, which takes half the time of float32 where the
  processor has instructions for it. So the rounding errors shrink as the search narrows.
- Of the ReLU units between (z, action) and the GRU, most are off for every candidate or on for every candidate. The
  former drop out, the latter are linear maps, which are multiplied out beforehand; which they are is taken from the
  candidates that were seen when the reference was made.

Shape legend: n candidates, t steps, a action, d latent, e width of the GRU, m ReLU units that are kept, da = d + a.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from worldline.model.predictor import GRUPredictor
from worldline.model.world import World

Product = Callable[[Tensor], Tensor]


class Step(NamedTuple):
    """One step of the reference, and what to do with differences from it."""

    v: Float[Tensor, "1 da"]
    """Latent and normalised action."""
    x: Float[Tensor, "1 m"]
    h: Float[Tensor, "1 e"]
    """The memory after the step."""
    gates: Float[Tensor, "1 e2"]
    new_x: Float[Tensor, "1 e"]
    new_h: Float[Tensor, "1 e"]
    out: Float[Tensor, "1 e"]
    """The sums before each nonlinearity; the new memory's two shares apart."""
    embed: tuple[Float[Tensor, "m da"], Float[Tensor, " m"]]
    """The kept ReLU units."""
    by_x: Product
    """From differences of (v, x) to those of gates, new_x and out."""


class Screen:
    """Rough rollouts of a world with a GRU. The weights are those that the world has when this is made."""

    def __init__(self, world: World) -> None:
        assert isinstance(world.predictor, GRUPredictor)
        predictor, cell = world.predictor, world.predictor.cell
        e = self._e = cell.hidden_size
        self._embed, self._out, self._last = (
            (layer.weight.detach(), layer.bias.detach())
            for layer in (predictor.embed[0], predictor.out[0], predictor.out[2])
            if isinstance(layer, torch.nn.Linear)
        )
        # tanh(v) = 2 sigmoid(2 v) - 1, and a sigmoid costs a third of a tanh: the 2 goes into the weights
        twice = torch.ones(3 * e)
        twice[2 * e :] = 2.0
        self._ih = cell.weight_ih.detach() * twice[:, None], cell.bias_ih.detach() * twice
        self._hh = cell.weight_hh.detach() * twice[:, None], cell.bias_hh.detach() * twice
        out = self._out[0]  # sees (h', x)
        self._from_x = torch.cat((self._ih[0], out[:, e:])).T.contiguous()  # (e, 4e)
        unused = torch.zeros(self._embed[0].shape[1], 4 * e)
        self._by_x = _rough_product(torch.cat((unused, self._from_x)))
        self._by_h = _rough_product(torch.cat((self._hh[0], out[:, :e])).T)
        self._by_last_h = _rough_product(out[:, :e].T)
        self._normalise = world.normalise_actions

    def reference(
        self, z: Float[Tensor, " d"], h: Float[Tensor, " e"], actions: Float[Tensor, "n t a"], fold: bool
    ) -> tuple[list[Step], Float[Tensor, "n t d"]]:
        """Return the reference of candidates like these, and the rough rollouts of these themselves.

        `fold` multiplies units out, which costs half a rollout and pays once the candidates are not too wide.
        """
        whole = self._trace(z, h, actions.mean(dim=0))
        spans: list[tuple[Tensor, Tensor]] = []
        imagined = self.rollout(z, h, actions, whole, spans)
        if not fold:
            return whole, imagined
        return [self._fold(step, *span) for step, span in zip(whole, spans, strict=True)], imagined

    def rollout(
        self,
        z: Float[Tensor, " d"],
        h: Float[Tensor, " e"],
        actions: Float[Tensor, "n t a"],
        reference: list[Step],
        spans: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Float[Tensor, "n t d"]:
        """Imagine all candidates roughly. They and the reference begin in the same state.

        `spans` is given the least and the largest sum of every ReLU unit over the candidates, for each step.
        """
        e, n, last = self._e, len(actions), len(reference) - 1
        state, z = h.expand(n, -1), z.expand(n, -1)
        by_h: Tensor | None = None  # the memory to begin with is the reference's own
        imagined = []
        for step, (action, shared) in enumerate(zip(self._normalise(actions).unbind(1), reference, strict=True)):
            v = torch.cat((z, action), dim=1)
            x = F.linear(v, *shared.embed)
            if spans is not None:
                spans.append((x.amin(dim=0), x.amax(dim=0)))
            by_x = shared.by_x(torch.cat((v - shared.v, x.relu_().sub_(shared.x)), dim=1))
            gates, new_h = by_x[:, : 2 * e], shared.new_h
            if by_h is not None:
                gates = gates + by_h[:, : 2 * e]
                new_h = torch.add(new_h, by_h[:, 2 * e : 3 * e])
            gates = torch.add(shared.gates, gates).sigmoid_()
            new = torch.add(shared.new_x, by_x[:, 2 * e : 3 * e]).addcmul_(gates[:, :e], new_h)
            state = torch.lerp(new.sigmoid_().mul_(2.0).sub_(1.0), state, gates[:, e:])
            by_h = self._by_h(state - shared.h) if step < last else self._by_last_h(state - shared.h)
            out = torch.add(shared.out, by_h[:, -e:] + by_x[:, 3 * e :]).relu_()
            z = z + F.linear(out, *self._last)
            imagined.append(z)
        return torch.stack(imagined, dim=1)

    def _trace(self, z: Float[Tensor, " d"], h: Float[Tensor, " e"], actions: Float[Tensor, "t a"]) -> list[Step]:
        """Imagine one trajectory in float32."""
        e, z, h = self._e, z[None], h[None]
        steps = []
        for action in self._normalise(actions)[:, None]:
            v = torch.cat((z, action), dim=1)
            x = F.linear(v, *self._embed).relu_()
            gx, gh = F.linear(x, *self._ih), F.linear(h, *self._hh)
            gates, new_x, new_h = gx[:, : 2 * e] + gh[:, : 2 * e], gx[:, 2 * e :], gh[:, 2 * e :]
            reset, update = torch.split(gates.sigmoid(), e, dim=1)
            h = torch.lerp((new_x + reset * new_h).sigmoid_().mul_(2.0).sub_(1.0), h, update)
            out = F.linear(torch.cat((h, x), dim=1), *self._out)
            z = z + F.linear(out.relu(), *self._last)
            steps.append(Step(v, x, h, gates, new_x, new_h, out, self._embed, self._by_x))
        return steps

    def _fold(self, step: Step, least: Float[Tensor, " e"], most: Float[Tensor, " e"]) -> Step:
        """Drop the units that are off for all candidates, and multiply out those that are on for all."""
        weight, bias = self._embed
        on = (least >= 0).nonzero()[:, 0]
        mixed = ((least < 0) & (most > 0)).nonzero()[:, 0]
        folded = torch.cat((weight[on].T @ self._from_x[on], self._from_x[mixed]))  # (da + m, 4e)
        return step._replace(x=step.x[:, mixed], embed=(weight[mixed], bias[mixed]), by_x=_rough_product(folded))


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


def _rough_product(weight: Float[Tensor, "i o"]) -> Product:
    """Return x -> x @ weight in bfloat16, the weight laid out for oneDNN where torch offers that."""
    rough = weight.to(torch.bfloat16).T.contiguous()
    operators = torch.ops.mkldnn
    if not hasattr(operators, "_linear_pointwise"):
        return lambda x: F.linear(x.to(torch.bfloat16), rough)
    packed = operators._reorder_linear_weight(rough)
    return lambda x: operators._linear_pointwise(x.to(torch.bfloat16), packed, None, "none", [], "")
