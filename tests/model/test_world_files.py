"""Worlds as files: to the bit, and never half."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from toy_world import SPEC, TINY
from worldline.core.errors import WorldlineError
from worldline.model import World, load_world, read_card, save_world
from worldline.model.checkpoint import weights_sha256


@pytest.fixture
def world() -> World:
    torch.manual_seed(1)
    world = World(TINY, SPEC)
    world.encode(torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8))  # moves the running statistics
    world.eval()
    world.gauge.fit(world, torch.randn(500, 24))
    return world


@pytest.fixture
def saved(world: World, tmp_path: Path) -> Path:
    return save_world(tmp_path / "toy", world, training={"seed": 7}, result={"hri_100": 0.5})


def test_a_world_comes_back_to_the_bit(world: World, saved: Path) -> None:
    loaded = load_world(saved)
    assert weights_sha256(loaded) == weights_sha256(world)
    assert (loaded.config, loaded.spec) == (world.config, world.spec)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    z, actions = torch.randn(2, 4, 24), torch.rand(2, 9, 2)
    with torch.inference_mode():
        for first, second in zip(*(_outputs(w, z, actions) for w in (world, loaded)), strict=True):
            assert torch.equal(first, second)


def _outputs(world: World, z: torch.Tensor, actions: torch.Tensor) -> list[torch.Tensor]:
    z_hat = world.rollout(world.begin(z, actions[:, :3]), actions[:, 3:])
    return [z_hat, world.decode(z_hat), world.encode(world.decode(z_hat)), world.gauge.region(z_hat)]


def test_the_card_says_what_it_is(saved: Path) -> None:
    card = read_card(saved)
    assert card["training"] == {"seed": 7}
    assert card["result"] == {"hri_100": 0.5}
    assert card["weights"]["bytes"] == (saved / "model.safetensors").stat().st_size


def test_half_precision_halves_the_file_and_is_stable(world: World, saved: Path, tmp_path: Path) -> None:
    half = save_world(tmp_path / "half", world, training={}, half=True)
    assert read_card(half)["weights"]["bytes"] < 0.6 * read_card(saved)["weights"]["bytes"]
    once = load_world(half)
    assert next(once.parameters()).dtype == torch.float32
    assert torch.equal(once.action_mean, world.action_mean)
    twice = load_world(save_world(tmp_path / "again", once, training={}, half=True))
    assert weights_sha256(twice) == weights_sha256(once)
    frames = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    torch.testing.assert_close(once.encode(frames), world.encode(frames), rtol=0.02, atol=0.02)


def test_nothing_is_overwritten(world: World, saved: Path) -> None:
    with pytest.raises(WorldlineError, match="exists already"):
        save_world(saved, world, training={})


def test_a_failed_save_leaves_nothing(world: World, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_world(tmp_path / "bad", world, training={"not JSON": object()})
    assert list(tmp_path.iterdir()) == []


def test_missing_worlds_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(WorldlineError, match="no such world"):
        load_world("no-such-world")
    with pytest.raises(WorldlineError, match="holds no checkpoint"):
        load_world(tmp_path)


def _edit_card(path: Path, **changes: object) -> None:
    card = json.loads((path / "world.json").read_text())
    (path / "world.json").write_text(json.dumps(card | changes))


def _flip_byte(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "model.safetensors").write_bytes(data)


def _rewrite_weights(path: Path, data: bytes) -> None:
    """Change the weights and let the card agree, so that the next check has to find it."""
    import hashlib

    (path / "model.safetensors").write_bytes(data)
    _edit_card(path, weights={"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})


def _truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:1000])


DAMAGE = {
    "weights missing": (lambda p: (p / "model.safetensors").unlink(), "is missing"),
    "weights cut short": (_truncate, "is not the file its card describes"),
    "a flipped bit": (_flip_byte, "is not the file its card describes"),
    "foreign weights": (lambda p: _rewrite_weights(p, b"hello, I am no safetensors file"), "not a world"),
    "foreign card": (lambda p: (p / "world.json").write_text('{"a": 1}'), "something else"),
    "card is a list": (lambda p: (p / "world.json").write_text("[]"), "something else"),
    "card cut short": (lambda p: (p / "world.json").write_text('{"format": "wor'), "not a JSON file"),
    "newer version": (lambda p: _edit_card(p, version=99), "upgrade worldline"),
    "unknown option": (lambda p: _edit_card(p, config={"depth": 3}), "not a world that this version can read"),
    "another shape": (
        lambda p: _edit_card(p, config=TINY.to_json() | {"latent_dim": 32}),
        "should have shape",
    ),
    "another model": (
        lambda p: _edit_card(p, config=TINY.to_json() | {"encoder": "vit"}),
        "its tensors are not those of its config",
    ),
    "an impossible option": (lambda p: _edit_card(p, config=TINY.to_json() | {"image_size": 5}), "multiple of 16"),
    "no hash": (lambda p: _edit_card(p, weights={"bytes": 5}), "lacks weights.sha256"),
    "weights are a list": (lambda p: _edit_card(p, weights=[]), "lacks weights.sha256"),
    "an option of another type": (
        lambda p: _edit_card(p, config=TINY.to_json() | {"context": "4"}),
        "context should be like 4, got '4'",
    ),
    "a negative size": (
        lambda p: _edit_card(p, config=TINY.to_json() | {"latent_dim": -3}),
        "not a world that this version can read",
    ),
    "config is a list": (lambda p: _edit_card(p, config=[1]), "not a world that this version can read"),
    "a range of text": (
        lambda p: _edit_card(p, spec=SPEC.to_json() | {"action_low": ["a", "b"]}),
        "not a world that this version can read",
    ),
    "no spec": (lambda p: _edit_card(p, spec={}), "not a world that this version can read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    copied = tmp_path / "copied"
    shutil.copytree(saved, copied)
    load_world(copied)
    damage(copied)
    with pytest.raises(WorldlineError, match=message) as refused:
        load_world(copied)
    assert "\n" not in str(refused.value)
