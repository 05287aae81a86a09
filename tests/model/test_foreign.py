"""Somebody else's model: found by its name, checked at its border, refused with what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from toy_world import SPEC, TINY
from worldline.core.errors import WorldlineError
from worldline.model.checkpoint import save_world
from worldline.model.foreign import ForeignWorld, is_foreign, load_any
from worldline.model.world import World

ACTIONS = np.zeros((4, 2), np.float32)
THEIRS = """
import torch
from types import SimpleNamespace

class Theirs:
    context, frame_skip = 2, 3
    def encode(self, frames):
        return frames.float().mean(dim=(1, 2))
    def begin(self, z, actions):
        return SimpleNamespace(z=z[:, -1], seen=actions)
    def step(self, state, action):
        return SimpleNamespace(z=state.z + action.sum(dim=1, keepdim=True))

def load():
    return Theirs()

def module():
    made = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(made.weight), torch.nn.init.zeros_(made.bias)
    for name in ("context", "frame_skip", "encode", "begin", "step"):
        setattr(made, name, getattr(Theirs(), name))
    return made

number = 7
"""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_models.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "their_models", raising=False)
    return tmp_path


def load(name: str) -> ForeignWorld:
    world = load_any(name, SPEC, actions=ACTIONS)
    assert isinstance(world, ForeignWorld)
    return world


def test_an_entry_point_is_imported_from_the_working_directory() -> None:
    world = load("their_models:load")
    assert (world.config.context, world.config.frame_skip) == (2, 3)
    assert (world.config.latent_dim, world.config.image_size) == (3, SPEC.image_size)
    state = world.begin(torch.zeros(4, 2, 3), torch.zeros(4, 1, 6))
    assert world.rollout(state, torch.ones(4, 5, 6))[:, :, 0].tolist() == [[6.0, 12.0, 18.0, 24.0, 30.0]] * 4


def test_what_came_is_identified(working_directory: Path) -> None:
    plain, module = load("their_models:load"), load("their_models:module")
    assert plain.num_parameters is None
    assert module.num_parameters == 6
    assert module.sha256 == load("their_models:module").sha256 != plain.sha256
    (working_directory / "more_models.py").write_text(THEIRS.replace("ones_(made.weight)", "zeros_(made.weight)"))
    assert load("more_models:module").sha256 != module.sha256


def test_ours_and_theirs_are_told_apart(tmp_path: Path) -> None:
    ours = save_world(tmp_path / "ours", World(TINY, SPEC), training={})
    assert isinstance(load_any(str(ours), SPEC, actions=ACTIONS), World)
    (tmp_path / "lewm").mkdir()
    (tmp_path / "lewm" / "config.json").touch()
    told = {name: is_foreign(name) for name in ("their_models:load", "lewm", "their_models.py", "ours", "nothing")}
    assert told == {
        "their_models:load": True,
        "lewm": True,
        "their_models.py": True,
        "ours": False,
        "nothing": False,
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:load", "no module 'no_such_module' in the working directory"),
        ("their_models:nothing", "defines no 'nothing'; expected module:callable"),
        ("their_models:number", "expected something to call, got a int"),
        ("builtins:dict", "builtins has no source file"),
    ],
)
def test_what_is_no_entry_point_is_refused(name: str, told: str) -> None:
    with pytest.raises(WorldlineError, match=told):
        load(name)


def test_a_module_that_their_module_lacks_is_their_error(working_directory: Path) -> None:
    (working_directory / "lacking.py").write_text("import something_that_is_not_here\n")
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_here"):
        load("lacking:load")


def theirs(**changed: object) -> SimpleNamespace:
    good = {
        "context": 1,
        "frame_skip": 1,
        "encode": lambda frames: torch.zeros(len(frames), 3),
        "begin": lambda z, actions: SimpleNamespace(z=z[:, -1]),
        "step": lambda state, action: state,
    }
    return SimpleNamespace(**(good | changed))


def wrapped(model: SimpleNamespace) -> ForeignWorld:
    return ForeignWorld(model, SPEC, source="theirs", sha256="", num_parameters=None)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"step": None}, "SimpleNamespace without step"),
        ({"context": 0}, "context should be a whole number from 1, got 0"),
        ({"frame_skip": 1.5}, "frame_skip should be a whole number from 1, got 1.5"),
        (
            {"encode": lambda frames: frames.float()},
            r"encode should return float latents \(2, d\).* got float32 \(2, 32",
        ),
        ({"encode": lambda frames: None}, "got None"),
    ],
)
def test_what_lacks_a_part_is_refused(changed: dict, told: str) -> None:
    wrapped(theirs())
    with pytest.raises(WorldlineError, match=told):
        wrapped(theirs(**changed))


def test_wrong_shapes_later_on_are_refused() -> None:
    frames = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
    world = wrapped(theirs(encode=lambda frames: torch.zeros(2, 3)))
    with pytest.raises(WorldlineError, match=r"float latents \(5, 3\), got float32 \(2, 3\)"):
        world.encode(frames)
    world = wrapped(theirs(encode=lambda frames: torch.full((len(frames), 3), torch.nan)))
    with pytest.raises(WorldlineError, match="finite latents"):
        world.encode(frames)
    for wrong in (SimpleNamespace(), SimpleNamespace(z=torch.zeros(5)), SimpleNamespace(z=torch.zeros(5, 3).int())):
        world = wrapped(theirs(step=lambda state, action, wrong=wrong: wrong))
        with pytest.raises(WorldlineError, match=r"step should return a state whose z holds float latents \(5, 3\)"):
            world.rollout(None, torch.zeros(5, 2, 2))
    world = wrapped(theirs(decode=lambda z: torch.zeros(5, 8, 8, 3)))
    with pytest.raises(WorldlineError, match=r"decode should return uint8 pictures \(5, h, w, 3\), got float32"):
        world.decode(torch.zeros(5, 3))
