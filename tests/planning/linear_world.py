"""A world whose dynamics are known: z' = A z + B a. So the best plan can be calculated."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from worldline.core.types import WorldSpec
from worldline.model.world import State, World
from worldline.planning.planners import Space

SPEC = WorldSpec(
    name="linear",
    image_size=16,
    step_seconds=0.1,
    action_names=("x", "y"),
    action_low=(-1.0, 0.0),
    action_high=(3.0, 2.0),
)
SPACE = Space.of(SPEC, torch.tensor([1.0, 1.0]), torch.tensor([1.2, 0.6]))


class LinearWorld(World):
    """Latents of 3 values, actions of 2; `rollout` is all that a cost asks for."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # none of a world's parts
        self.a = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.1, 0.0, 0.7]])
        self.b = torch.tensor([[0.5, 0.0], [0.1, 0.4], [0.0, 0.3]])

    def rollout(self, state: State, actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t d"]:
        z, imagined = state.z, []
        for action in actions.unbind(1):
            z = z @ self.a.T + action @ self.b.T
            imagined.append(z)
        return torch.stack(imagined, dim=1)


def begin(*z: list[float]) -> State:
    return State(torch.tensor(z), ())
