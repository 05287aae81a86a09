"""A rollout as training takes it: eager, or on CUDA as two graphs, one forward and one backward.

A hundred steps of a small predictor are thousands of tiny kernels, which a GPU finishes faster than a CPU can ask for
them. Captured once, they are asked for all together.

Shape legend: b batch, c context, t steps, d latent, a action.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.model.world import World

_EAGER_FIRST = 3
"""Updates of a shape before it is captured: a curriculum may leave it again at once."""


class Imagination:
    """`world.rollout(world.begin(z, actions), ahead)` with gradients for the predictor's weights.

    On CUDA a shape that stays is captured. One graph is kept, since it holds the activations of all of its steps. Its
    result is overwritten by the next call, so use it up before.
    """

    def __init__(self, world: World, device: str) -> None:
        self._rollout, self._cuda = _Rollout(world), device == "cuda"
        self._key: tuple[Any, ...] = ()
        self._calls = 0
        self._graphed: Any = None

    @property
    def captured(self) -> bool:
        return self._graphed is not None

    def __call__(
        self, z: Float[Tensor, "b c d"], actions: Float[Tensor, "b cm1 a"], ahead: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t d"]:
        """Imagine the latents after each action of `ahead`. No gradient reaches `z`."""
        arguments = (z.detach(), actions, ahead)
        if not (self._cuda and torch.is_grad_enabled()):
            eager: Tensor = self._rollout(*arguments)
            return eager
        key = (*(argument.shape for argument in arguments), z.dtype, torch.is_autocast_enabled("cuda"))
        if key != self._key:
            self._key, self._calls, self._graphed = key, 0, None
        self._calls += 1
        if self._graphed is None and self._calls > _EAGER_FIRST:
            self._graphed = self._capture(arguments)
        imagined: Tensor = (self._graphed or self._rollout)(*arguments)
        return imagined

    def _capture(self, arguments: tuple[Tensor, ...]) -> Any:
        """Capture on copies: the graph reads its arguments from there."""
        samples = tuple(argument.contiguous().clone() for argument in arguments)
        half = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", torch.bfloat16, half, False):  # a cached cast would be no part of the graph
            return torch.cuda.make_graphed_callables(_Rollout(self._rollout.world), samples)


class _Rollout(nn.Module):
    """Has the predictor's parameters and no others, for which a graph would look for gradients in vain."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.predictor = world.predictor
        self.__dict__["world"] = world
        self.train(world.training)

    @property
    def world(self) -> World:
        return self.__dict__["world"]  # type: ignore[no-any-return]

    def forward(self, z: Tensor, actions: Tensor, ahead: Tensor) -> Tensor:
        return self.world.rollout(self.world.begin(z, actions), ahead)
