"""Worlds as files: a directory with `model.safetensors` and `world.json`, the card that says what it is.

The gauge's error estimator, where there is one, lies beside them in `estimator.safetensors`. It reads a world and
changes nothing in it, so that it can be fitted later and has no part in the hash that replays are tied to.

A run directory holds checkpoints under `best` and `last`; worlds that come with the package lie in `worldline/shipped`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.core.files import fsync_directory, read_json, sha256_file, write_bytes, write_json
from worldline.core.types import WorldSpec
from worldline.model.estimator import ErrorEstimator
from worldline.model.int8 import CHECKPOINT, Int8World, is_bundle
from worldline.model.world import World, WorldConfig

FORMAT = "worldline-world"
VERSION = 1
ESTIMATOR_VERSION = "2"
CARD, WEIGHTS, ESTIMATOR = "world.json", "model.safetensors", "estimator.safetensors"
SHIPPED = Path(__file__).resolve().parents[1] / "shipped"


def save_world(
    path: str | Path,
    world: World,
    *,
    training: dict[str, Any],
    result: dict[str, Any] | None = None,
    half: bool = False,
) -> Path:
    """Write a world as a new directory, whole or not at all.

    `training` says where it comes from (command, seed, data fingerprint), `result` what it reaches. `half` stores
    float16, for worlds that are shipped; they are computed in float32 all the same.

    Raises:
        WorldlineError: `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise WorldlineError(f"{path} exists already; choose another place, or remove it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_world(temporary, world, training=training, result=result, half=half)
        os.rename(temporary, path)
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def write_world(
    directory: Path, world: World, *, training: dict[str, Any], result: dict[str, Any] | None = None, half: bool = False
) -> None:
    """Write a world's files into `directory`, which nobody reads yet; `save_world` is the atomic form."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in world_tensors(world).items()}
    if half:
        tensors = {n: t.half() if t.dtype == torch.float32 and not _exact(n) else t for n, t in tensors.items()}
    weights = directory / WEIGHTS
    write_bytes(weights, save(tensors))
    card = {
        "format": FORMAT,
        "version": VERSION,
        "config": world.config.to_json(),
        "spec": world.spec.to_json(),
        "weights": {
            "sha256": sha256_file(weights),
            "bytes": weights.stat().st_size,
            "storage": "float16" if half else "float32",
            "parameters": sum(p.numel() for p in world.parameters()),
        },
        "training": training,
        "result": result or {},
    }
    write_json(directory / CARD, card)
    if world.gauge.estimator is not None:
        save_estimator(directory, world.gauge.estimator)


def save_estimator(directory: Path, estimator: ErrorEstimator) -> None:
    """Put an error estimator beside the world in `directory` that it was fitted on, in place of one already there."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in estimator.state_dict().items()}
    card = {"version": ESTIMATOR_VERSION, "weights_sha256": read_card(directory)["weights"]["sha256"]}
    write_bytes(directory / ESTIMATOR, save(tensors, metadata=card))


def load_world(path_or_name: str | Path) -> World:
    """Load a world from a checkpoint, a run (its best checkpoint, else its last), a shipped name, or a bundle.

    It comes ready for inference: evaluation mode, no gradients, on the CPU, float32.

    Raises:
        WorldlineError: there is no such world, or its files are foreign, damaged or do not fit each other.
    """
    if is_bundle(path_or_name):
        return Int8World.open(path_or_name, load_world(find_world(path_or_name)))
    directory = find_world(path_or_name)
    card = read_card(directory)
    weights = directory / WEIGHTS
    if not weights.exists():
        raise WorldlineError(f"{weights} is missing beside {CARD}; copy the checkpoint again")
    if (found := sha256_file(weights)) != card["weights"]["sha256"]:
        raise WorldlineError(
            f"{weights} is not the file its card describes: expected SHA-256 {card['weights']['sha256'][:12]}... and "
            f"{card['weights']['bytes']} bytes, got {found[:12]}... and {weights.stat().st_size}; copy it again"
        )
    try:
        config = WorldConfig(**_typed(card["config"]))
        spec = WorldSpec.from_json(card["spec"])
        tensors = load_file(weights)
        world = World(config, spec)
    except (SafetensorError, TypeError, KeyError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise WorldlineError(f"{directory}: not a world that this version can read ({reason})") from None
    _fill(world, tensors, weights)
    if (directory / ESTIMATOR).exists():
        world.gauge.estimator = _load_estimator(directory / ESTIMATOR, world, found)
    return world.eval().requires_grad_(False)


def read_card(path_or_name: str | Path) -> dict[str, Any]:
    """Return a world's card: config, spec, weights (hash, bytes), training (where it comes from) and result.

    Raises:
        WorldlineError: there is no such world, or its card is foreign or of a newer version.
    """
    path = find_world(path_or_name) / CARD
    card = read_json(path)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise WorldlineError(f"{path}: expected a card of format {FORMAT!r}; this file is something else")
    if card.get("version") != VERSION:
        raise WorldlineError(
            f"{path}: card version {card.get('version')}, this worldline reads {VERSION}; upgrade worldline"
        )
    if missing := {"config", "spec", "weights", "training", "result"} - card.keys():
        raise WorldlineError(f"{path}: the card lacks {', '.join(sorted(missing))}; copy the checkpoint again")
    weights = card["weights"]
    if not isinstance(weights, dict) or not {"sha256", "bytes"} <= weights.keys():
        raise WorldlineError(f"{path}: the card lacks weights.sha256 or weights.bytes; copy the checkpoint again")
    return card


def find_world(path_or_name: str | Path) -> Path:
    """Return the checkpoint directory that a path or a shipped name means.

    Raises:
        WorldlineError: nothing is there.
    """
    path = Path(path_or_name)
    for candidate in (path, path / "best", path / "last", path / CHECKPOINT):
        if (candidate / CARD).exists():
            return candidate
    if len(path.parts) == 1 and (SHIPPED / path / CARD).exists():
        return SHIPPED / path
    names = shipped_worlds()
    known = f"the shipped worlds are {', '.join(names)}" if names else "no worlds are shipped with this version"
    reason = "holds no checkpoint" if path.exists() else "no such world"
    raise WorldlineError(f"{path_or_name}: {reason}; expected a checkpoint, a run with one, or a name ({known})")


def shipped_worlds() -> list[str]:
    """Return the names of the worlds that come with the package."""
    return sorted(card.parent.name for card in SHIPPED.glob(f"*/{CARD}"))


def world_tensors(world: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors by name, those of a world's error estimator left out."""
    return {name: tensor for name, tensor in world.state_dict().items() if not name.startswith("gauge.estimator.")}


def weights_sha256(world: nn.Module) -> str:
    """Return a hash over a model's tensors (`world_tensors`) as they are in memory: names, shapes, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(world_tensors(world).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    """Return a config's options. Raises TypeError where one has another type than its default."""
    for name, default in WorldConfig().to_json().items():
        if name in options and type(options[name]) is not type(default):
            raise TypeError(f"{name} should be like {default!r}, got {options[name]!r}")
    return options


def _exact(name: str) -> bool:
    """Name the small tensors whose range or precision float16 lacks: statistics, not weights."""
    return name.startswith("action_") or "running_" in name or (name.startswith("gauge.") and "whitening" not in name)


def _load_estimator(path: Path, world: World, weights: str) -> ErrorEstimator | None:
    try:
        with safe_open(path, framework="pt") as file:
            card = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if card.get("version") != ESTIMATOR_VERSION:
            warnings.warn(
                f"{path} is of another version of worldline and left unread; scripts/fit_gauge fits it again",
                stacklevel=3,
            )
            return None
        estimator = ErrorEstimator(
            world.config.latent_dim, num_real=len(tensors["real"]), hidden=len(tensors["hidden.weight"])
        )
        estimator.load_state_dict(tensors)
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise WorldlineError(f"{path}: not an error estimator of this world ({reason}); remove it") from None
    if card.get("weights_sha256") != weights:
        raise WorldlineError(f"{path} was fitted on other weights than those beside it; remove it, or fit it again")
    return estimator


def _fill(world: World, tensors: dict[str, Tensor], source: Path) -> None:
    expected = world.state_dict()
    if difference := expected.keys() ^ tensors.keys():
        raise WorldlineError(f"{source}: its tensors are not those of its config (differs in {sorted(difference)[:3]})")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise WorldlineError(
                f"{source}: {name} should have shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
            )
    world.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()})
