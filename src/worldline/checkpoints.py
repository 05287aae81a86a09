"""What a trained checkpoint still lacks to be played and listed: real frames to begin from, and its result."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, write_json
from worldline.core.seeding import rng_for
from worldline.core.types import WorldSpec
from worldline.data.cache import FrameCache
from worldline.data.lerobot import open_dataset
from worldline.data.simulators import NAMES
from worldline.engine.workloads.latent import STARTS, Starts, make_starts, save_starts
from worldline.model.checkpoint import CARD, SHIPPED, find_world, read_card

_STARTS = 8


def add_starts(checkpoint: str | Path) -> None:
    """Give a checkpoint the real frames that a session begins from, if it has none.

    They come from the world's simulator, on seeds that no episode has; where there is none, from held-out episodes of
    the dataset that it was trained on.

    Raises:
        WorldlineError: there is no such checkpoint, or neither simulator nor dataset is here.
    """
    directory = find_world(checkpoint)
    if (directory / STARTS).exists():
        return
    card = read_card(directory)
    spec, config = WorldSpec.from_json(card["spec"]), card["config"]
    if spec.name in NAMES:
        starts = make_starts(spec.name, config["context"], count=_STARTS, image_size=config["image_size"])
    else:
        starts = _from_dataset(directory, card["training"], config["image_size"], config["context"])
    save_starts(directory, starts)


def add_result(checkpoint: str | Path, evaluation: Path) -> None:
    """Write an evaluation's headline figures into the checkpoint's card. Shipped worlds keep theirs."""
    directory = find_world(checkpoint)
    if not directory.is_relative_to(SHIPPED):
        write_card_result(directory, evaluation)


def write_card_result(directory: Path, evaluation: Path) -> None:
    """Write an evaluation's headline figures into the card in `directory`, whatever world it is."""
    figures = read_json(evaluation / "result.json")
    verdict = figures["verdict"]
    horizon = verdict["h_star"]
    card = read_card(directory)
    card["result"] = {
        "valid": verdict["valid"],
        "hri": {steps: value and value["value"] for steps, value in verdict["hri"].items()},
        "h_star": horizon["steps"],
        "h_star_seconds": horizon["seconds"],
        "h_star_ended_by": horizon["ended_by"],
        "data": figures["dataset"],
    }
    write_json(directory / CARD, card)


def _from_dataset(directory: Path, training: dict, image_size: int, context: int) -> Starts:  # type: ignore[type-arg]
    place = training.get("config", {}).get("data", "")
    if not place or not Path(place).is_dir():
        raise WorldlineError(
            f"{directory} has no real frames to begin from, and its dataset {place or '(unknown)'} is not here; "
            "run the command where the dataset is"
        )
    dataset = open_dataset(place)
    cache = FrameCache(dataset, image_size)
    episodes = [i for i in dataset.split("test") or range(dataset.num_episodes) if dataset.lengths[i] >= context]
    if not episodes:
        raise WorldlineError(f"{place}: no held-out episode has the {context} frames that the world begins from")
    rng = rng_for("starts", dataset.fingerprint)
    chosen = [int(episode) for episode in rng.choice(episodes, _STARTS)]
    firsts = [int(rng.integers(0, dataset.lengths[episode] - context + 1)) for episode in chosen]
    pairs = list(zip(chosen, firsts, strict=True))
    action_dim = dataset.spec.action_dim
    return Starts(
        frames=np.stack([cache.frames(episode, first, context) for episode, first in pairs]),
        actions=np.stack([dataset.actions(episode)[first : first + context - 1] for episode, first in pairs]),
        seeds=np.zeros(_STARTS, dtype=np.int64),
        prefix=np.zeros((_STARTS, 1, action_dim), dtype=np.float32),
        prefix_lengths=np.zeros(_STARTS, dtype=np.int64),
    )
