"""A static world computes what the world computes, up to rounding, and allocates nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_arena import assert_nothing_overlaps, spoil
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toy_world import SPEC
from worldline.core.errors import WorldlineError
from worldline.engine.workloads.static_world import StaticWorld
from worldline.model import WorldConfig
from worldline.model.world import State, World


def make_world(**options: Any) -> World:
    torch.manual_seed(3)
    made = World(WorldConfig(**({"image_size": 32, "latent_dim": 24, "hidden": 48} | options)), SPEC).eval()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0.0, 0.3)
        if made.config.predictor == "gru":
            made.predictor.out[2].weight.mul_(10.0)  # an untrained world hardly moves
        made.gauge.fit(made, torch.randn(200, made.config.latent_dim))
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"image_size": 48, "conv_width": 8, "decoder_width": 4, "latent_norm": False}, {"projection": "normalise"}],
    ids=["plain", "other sizes", "on the sphere"],
)
def test_it_computes_what_the_world_computes(options: dict[str, Any]) -> None:
    world = make_world(**options)
    size = world.config.image_size
    action, frame = torch.zeros(1, 2), torch.zeros(size, size, 3, dtype=torch.uint8)
    with torch.inference_mode():
        static = StaticWorld(world, action, frame)
        assert_nothing_overlaps(static.program)
        z = world.encode(torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8))
        state = State(z, world.predictor.initial(1))
        static.z.copy_(state.z)
        static.h.copy_(state.memory[0])
        for step in range(12):
            action.copy_(torch.rand(1, 2) * 700 - 100)  # sometimes beyond the bounds, where it is clipped
            spoil(static.program)
            for stage in ("step", "decode", "region", "encode", "gap"):
                static.run[stage]()
            state = world.step(state, action.clamp(0.0, 512.0))
            close(static.z, state.z)
            close(static.h, state.memory[0])
            picture = world.decode(state.z)[0]
            assert (frame.int() - picture.int()).abs().max() <= 1  # where rounding to bytes was a near thing
            assert (frame != picture).float().mean() < 0.01
            close(static.seen, world.encode(frame[None]))
            close(static.readings[0], world.gauge.region(state.z)[0])
            gap = (world.encode(frame[None]) - state.z) @ world.gauge.whitening
            close(static.readings[1], gap.norm() / world.gauge.cycle99)
            assert step == 0 or float((state.z - z).abs().max()) > 0.1


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_frame_allocates_nothing() -> None:
    world = make_world()
    action, frame = torch.zeros(1, 2), torch.zeros(32, 32, 3, dtype=torch.uint8)
    with torch.inference_mode():
        static = StaticWorld(world, action, frame)
        known = {part.untyped_storage().data_ptr() for part in (static.program.memory, frame)}
        found = Allocations(known)
        with found:
            for run in static.run.values():
                run()
            assert found.made == []
            torch.add(static.z, 1.0)
            assert found.made == ["aten.add.Tensor"]


class Allocations(TorchDispatchMode):
    """Notes down every operation whose result lies outside of known memory."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.made: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self.known:
                self.made.append(str(function))
        return result


def test_other_worlds_are_refused_with_the_way_out() -> None:
    for options, reason in (
        ({"predictor": "transformer"}, "has a transformer"),
        ({"encoder": "vit"}, "has a vit encoder"),
        ({"projection": "quantise"}, "lie on a grid"),
    ):
        with pytest.raises(WorldlineError, match=f"{reason}; give mode=eager"):
            StaticWorld(make_world(**options), torch.zeros(1, 2), torch.zeros(32, 32, 3, dtype=torch.uint8))
