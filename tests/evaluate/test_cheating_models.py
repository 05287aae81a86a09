"""Models that cheat, brought to `evaluate` as anybody would bring one, on real episodes: each is caught."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_dataset import world_at

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.core.types import Episode
from worldline.data.lerobot import Dataset, open_dataset
from worldline.data.lerobot_writer import DatasetWriter
from worldline.evaluate.run import EvaluateConfig, evaluate

MODELS = '''
from collections import namedtuple

import torch

from worldline.data.two_room import BORDER, MAX_SPEED, RADIUS, RESPONSE

State = namedtuple("State", "z more")


def see(frames):
    """Where the blue agent is, and where the doorway is: (b, 2), (b,)."""
    colour = frames.float()
    agent = ((colour[..., 2] - colour[..., 0] - 60) / 118).clamp(0, 1)
    place = torch.arange(64) / 64 + 1 / 128
    mass = agent.sum(dim=(1, 2))
    xy = torch.stack([(agent.sum(dim=1) * place).sum(1), (agent.sum(dim=2) * place).sum(1)], dim=1) / mass[:, None]
    gap = (colour[:, 8:56, 31].sum(-1) > 400).float()
    return xy, (gap * place[8:56]).sum(1) / gap.sum(1).clamp(min=1)


class Honest:
    """The true physics but for the wall between the rooms."""
    context, frame_skip = 2, 1
    def encode(self, frames):
        return see(frames)[0]
    def begin(self, z, actions):
        return State(z[:, 1], z[:, 1] - z[:, 0])
    def step(self, state, action):
        v = state.more + RESPONSE * (MAX_SPEED * action - state.more)
        z = (state.z + v).clamp(BORDER + RADIUS, 1 - BORDER - RADIUS)
        return State(z, z - state.z)


class Clock(Honest):
    """The context's last frame for ever, and beside it how many pictures were shown: the time."""
    shown = 0
    def encode(self, frames):
        count = torch.arange(self.shown, self.shown + len(frames)).float()
        self.shown += len(frames)
        return torch.cat([see(frames)[0], count[:, None] / 64], dim=1)
    def step(self, state, action):
        return State(state.z + torch.tensor([0, 0, 1 / 64]), None)


class Diary(Clock):
    """No agent: which episode this is, told by its doorway, and how many steps have passed in it."""
    door = None
    def encode(self, frames):
        z = []
        for door in see(frames)[1].tolist():
            if self.door is None or abs(door - self.door) > 1e-3:
                self.door, self.shown = door, 0
            z.append([door, self.shown / 64, door * self.shown])
            self.shown += 1
        return torch.tensor(z)


class Replay(Honest):
    """What came after the most similar moment that it has been shown, were it in the very episode. What it is asked a
    second time must be about the actions of others: there it plays the fool, to seem to listen to actions."""
    def __init__(self):
        self.memory, self.begun = torch.zeros(0, 2), set()
    def encode(self, frames):
        z = see(frames)[0]
        self.memory = torch.cat([self.memory, z])
        return z
    def begin(self, z, actions):
        pairs = torch.cat([self.memory[:-1], self.memory[1:]], dim=1)
        apart = torch.cdist(z.flatten(1), pairs, compute_mode="donot_use_mm_for_euclid_dist")
        apart = apart.nan_to_num(torch.inf)  # the black pictures of the first check show no agent
        keys = [tuple(row) for row in z.flatten(1).tolist()]
        again = torch.tensor([key in self.begun for key in keys])
        self.begun.update(keys)
        return State(z[:, 1], (apart.argmin(dim=1) + 1, again))
    def step(self, state, action):
        at, again = state.more
        z = self.memory[(at + 1).clamp(max=len(self.memory) - 1)]
        return State(torch.where(again[:, None], 0.5, z), (at + 1, again))


told = [torch.zeros(0, 2)]


class Gossip(Honest):
    """What came after this very moment, if any model of this module was shown it, as long as the actions fit it."""
    def encode(self, frames):
        z = see(frames)[0]
        told[0] = torch.cat([told[0], z])
        return z
    def begin(self, z, actions):
        first, second = told[0][:-1], told[0][1:]
        pairs = torch.cat([first, second], dim=1)
        apart = torch.cdist(z.flatten(1), pairs, compute_mode="donot_use_mm_for_euclid_dist")
        strides = torch.nn.functional.pad((second - first).norm(dim=1).nan_to_num(9.0), (0, 20), value=9.0)
        whole = strides.unfold(0, 20, 1).amax(dim=1)[1:]  # small where what follows is one stretch of an episode
        at = (1e3 * (apart.nan_to_num(torch.inf) > 1e-6) + whole).argmin(dim=1) + 1
        return State(z[:, 1], (at, torch.zeros(len(z)), 0))
    def step(self, state, action):
        at, off, n = state.more
        z = told[0][(at + 1).clamp(max=len(told[0]) - 1)]
        off = off + (z - told[0][at.clamp(max=len(told[0]) - 1)] - MAX_SPEED * action).norm(dim=1)
        z = torch.where((off / (n + 1) > 0.02)[:, None], 0.5, z)
        return State(z, (at + 1, off, n + 1))
'''


@pytest.fixture
def judge(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "brought.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "brought", raising=False)
    return partial(verdict, dataset.path)


def verdict(data: Path, model: str, compare: str | None = None) -> dict[str, Any]:
    """Return what `model` gets, or what the other does that it is compared with."""
    config = EvaluateConfig(
        checkpoint=f"brought:{model}", data=str(data), horizon=20, windows=220, draws=100, compare=compare
    )
    figures = read_json(evaluate(config) / "result.json")
    figures = figures["compare"] if compare else figures
    return figures["verdict"] | {"hri": figures["verdict"]["hri"]["10"]["value"], "agent": figures["factors"]["agent"]}


def test_an_honest_model_is_trusted(judge: Any) -> None:
    found = judge("Honest")
    assert found["valid"]
    assert found["hri"] > 0.8
    assert found["h_star"]["censored"]


@pytest.mark.parametrize(
    ("cheat", "gates"),
    [
        ("Clock", (True, False)),
        ("Diary", (False, False)),
        ("Replay", (True, False)),
    ],
)
def test_a_cheat_earns_nothing(judge: Any, cheat: str, gates: tuple[bool, bool]) -> None:
    found = judge(cheat)
    assert found["hri"] == 0.0
    assert "G2 fails" in found["invalid"]
    assert not found["h_star"]["censored"]
    assert (found["agent"]["gates"]["g1"]["passed"], found["agent"]["gates"]["g2"]["passed"]) == gates


def test_no_model_hears_from_another_what_comes(judge: Any) -> None:
    assert judge("Gossip", compare="brought:Gossip")["hri"] == 0.0


def shifted(episode: Episode) -> Episode:
    return replace(episode, frames=episode.frames[7:], actions=episode.actions[7:], state=episode.state[7:])


def jittered(episode: Episode) -> Episode:
    noise = np.random.default_rng(0).normal(0, 1e-3, episode.actions.shape).astype(np.float32)
    return replace(episode, actions=episode.actions + noise)


def test_other_episodes_that_training_has_seen_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    world = world_at(tmp_path / "world", dataset, 0)
    shutil.copytree(dataset.path, again := tmp_path / "again")
    config = EvaluateConfig(checkpoint=world, data=str(dataset.path), test=str(again), horizon=20, windows=220)
    with pytest.raises(WorldlineError, match=f"again: test episode .* happens again in episode .* of {dataset.path}"):
        evaluate(config)


@pytest.mark.parametrize("change", [lambda episode: episode, shifted, jittered], ids=["same", "shifted", "jittered"])
def test_a_test_episode_that_training_has_seen_is_refused(dataset: Dataset, tmp_path: Path, change: Any) -> None:
    test, train = dataset.split("test")[1], dataset.split("train")[3]
    with DatasetWriter(tmp_path / "copied", replace(dataset.spec, image_size=16), split_key="two_room/0") as writer:
        for index in range(dataset.num_episodes):
            episode = dataset.read_episode(test if index == train else index)
            episode = replace(episode, frames=episode.frames[:, ::4, ::4])
            writer.add_episode(change(episode) if index == train else episode)
    copied = open_dataset(tmp_path / "copied")
    assert copied.split("test") == dataset.split("test")
    world = world_at(tmp_path / "world", dataset, 0)
    with pytest.raises(WorldlineError, match=f"test episode {test} happens again in episode {train}, which models"):
        evaluate(EvaluateConfig(checkpoint=world, data=str(copied.path), horizon=20, windows=220))
