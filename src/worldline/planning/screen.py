"""Rough rollouts of many candidates at half the price, to tell which of them are worth an exact one.

Three hundred candidates through a GRU are matrix products and little else, and a processor with bfloat16 instructions
multiplies that type twice as fast as float32. Its 8 bits would be too few for the states themselves, but candidates of
one problem run close together: all that they share is computed once, in float32, along one reference trajectory, and
only the products of their differences from it are rounded. So the error shrinks as the search narrows.

Shape legend: n candidates, t steps, a action, d latent, e width of the GRU.
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


class Reference(NamedTuple):
    """One step of the reference trajectory; the sums before each nonlinearity."""

    x: Float[Tensor, "1 e"]
    gates: Float[Tensor, "1 e2"]
    new_x: Float[Tensor, "1 e"]
    new_h: Float[Tensor, "1 e"]
    h: Float[Tensor, "1 e"]
    out: Float[Tensor, "1 e"]


class Screen:
    """Rough rollouts of a world with a GRU. The weights are those that the world has when this is made."""

    def __init__(self, world: World) -> None:
        assert isinstance(world.predictor, GRUPredictor)
        predictor, cell = world.predictor, world.predictor.cell
        e = self._e = cell.hidden_size
        embed, out, last = (
            (layer.weight.detach(), layer.bias.detach())
            for layer in (predictor.embed[0], predictor.out[0], predictor.out[2])
            if isinstance(layer, torch.nn.Linear)
        )
        self._embed, self._out, self._last = embed, out, last
        # tanh(v) = 2 sigmoid(2 v) - 1, and a sigmoid costs a third of a tanh: the 2 goes into the weights
        twice = torch.ones(3 * e)
        twice[2 * e :] = 2.0
        self._ih = cell.weight_ih.detach() * twice[:, None], cell.bias_ih.detach() * twice
        self._hh = cell.weight_hh.detach() * twice[:, None], cell.bias_hh.detach() * twice
        wx, wh = self._ih[0], self._hh[0]
        self._first_gates = _rough_product(wx[: 2 * e])
        self._gates = _rough_product(torch.cat((wx[: 2 * e], wh[: 2 * e]), dim=1))
        self._new_x, self._new_h = _rough_product(wx[2 * e :]), _rough_product(wh[2 * e :])
        self._hidden = _rough_product(out[0])
        self._normalise = world.normalise_actions

    def reference(
        self, z: Float[Tensor, " d"], h: Float[Tensor, " e"], actions: Float[Tensor, "t a"]
    ) -> list[Reference]:
        """Imagine one trajectory in float32 and return what the candidates near it share."""
        e, z, h = self._e, z[None], h[None]
        steps = []
        for action in self._normalise(actions)[:, None]:
            x = F.linear(torch.cat((z, action), dim=1), *self._embed).relu_()
            gx, gh = F.linear(x, *self._ih), F.linear(h, *self._hh)
            gates = gx[:, : 2 * e] + gh[:, : 2 * e]
            reset, update = torch.split(gates.sigmoid(), e, dim=1)
            new = (gx[:, 2 * e :] + reset * gh[:, 2 * e :]).sigmoid_().mul_(2.0).sub_(1.0)
            h = torch.lerp(new, h, update)
            hidden = F.linear(torch.cat((h, x), dim=1), *self._out)
            z = z + F.linear(hidden.relu(), *self._last)
            steps.append(Reference(x, gates, gx[:, 2 * e :].clone(), gh[:, 2 * e :].clone(), h, hidden))
        return steps

    def rollout(
        self,
        z: Float[Tensor, " d"],
        h: Float[Tensor, " e"],
        actions: Float[Tensor, "n t a"],
        reference: list[Reference],
    ) -> Float[Tensor, "n t d"]:
        """Imagine all candidates roughly. They and the reference begin in the same state."""
        e, n = self._e, len(actions)
        state, z = h.expand(n, -1), z.expand(n, -1)
        before = torch.empty(n, 2 * e, dtype=torch.bfloat16)  # differences of (x, h), then of (h', x)
        after = torch.empty_like(before)
        imagined = []
        for step, (action, shared) in enumerate(zip(self._normalise(actions).unbind(1), reference, strict=True)):
            x = F.linear(torch.cat((z, action), dim=1), *self._embed).relu_().sub_(shared.x)
            before[:, :e] = after[:, e:] = x
            if step == 0:  # the memory is the reference's own
                gates, new_h = self._first_gates(before[:, :e]), shared.new_h
            else:
                gates, new_h = self._gates(before), self._new_h(before[:, e:]) + shared.new_h
            gates = torch.add(shared.gates, gates).sigmoid_()
            new = self._new_x(before[:, :e]) + shared.new_x
            new = new.addcmul_(gates[:, :e], new_h).sigmoid_().mul_(2.0).sub_(1.0)
            state = torch.lerp(new, state, gates[:, e:])
            before[:, e:] = after[:, :e] = state - shared.h
            hidden = torch.add(shared.out, self._hidden(after)).relu_()
            z = z + F.linear(hidden, *self._last)
            imagined.append(z)
        return torch.stack(imagined, dim=1)


def make_screen(world: World) -> Screen | None:
    """Return a screen for `world`, or None where it would not pay: another predictor, or no bfloat16 instructions."""
    on_cpu = world.action_mean.device.type == "cpu"
    if isinstance(world.predictor, GRUPredictor) and on_cpu and _multiplies_bfloat16():
        with torch.no_grad():
            return Screen(world)
    return None


def _multiplies_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


def _rough_product(weight: Float[Tensor, "o i"]) -> Callable[[Tensor], Tensor]:
    """Return x -> x @ weight.T in bfloat16, the weight laid out for oneDNN where torch offers that."""
    rough = weight.to(torch.bfloat16).contiguous()
    try:
        operators = torch.ops.mkldnn
        pack, multiply = operators._reorder_linear_weight, operators._linear_pointwise
    except AttributeError:  # a torch without them
        return lambda x: F.linear(x, rough)
    packed = pack(rough)
    return lambda x: multiply(x, packed, None, "none", [], "")
