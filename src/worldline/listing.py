"""What is here: simulators, shipped worlds, presets, and the datasets and runs under the working directory.

Reads cards and result files only, so that listing loads neither torch nor a simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.simulators import NAMES

PACKAGE = Path(__file__).parent
_SIMULATOR_PACKAGE = {
    "pusht": "gym_pusht",
    "reacher": "dm_control",
    "point_mass": "dm_control",
    "vizdoom": "vizdoom",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing found: where it is and what can be said about it in a line."""

    path: Path
    facts: str


def listing(root: Path) -> str:
    """Return everything under `root` and in the package as text."""
    parts = [
        ("Simulators (worldline collect env=NAME)", [_simulator(name) for name in NAMES]),
        ("Shipped worlds (worldline play NAME)", [(world.path.name, world.facts) for world in shipped_worlds()]),
        ("Presets", _presets()),
        ("Datasets (worldline train data=NAME or data=PATH)", _rows(root, datasets(root))),
        ("Clips (worldline pretrain data=PATH)", _rows(root, clips(root))),
        ("Runs (worldline evaluate PATH, worldline play PATH)", _rows(root, runs(root))),
    ]
    lines = []
    for title, rows in parts:
        lines += [title, *_aligned(rows), ""]
    return "\n".join(lines).rstrip()


def shipped_worlds() -> list[Entry]:
    """Return the worlds that come with the package."""
    return [_described(card.parent, _world_facts) for card in sorted((PACKAGE / "shipped").glob("*/world.json"))]


def datasets(root: Path) -> list[Entry]:
    """Return the datasets in `root/datasets`."""
    return [
        _described(info.parents[1], _dataset_facts) for info in sorted((root / "datasets").glob("*/meta/info.json"))
    ]


def clips(root: Path) -> list[Entry]:
    """Return what was ingested into `root/datasets`."""
    return [_described(card.parent, _clips_facts) for card in sorted((root / "datasets").glob("*/clips.json"))]


def runs(root: Path) -> list[Entry]:
    """Return the training runs in `root/runs`."""
    found = {card.parents[1] for card in (root / "runs").glob("*/*/world.json")}
    return [_described(path, _run_facts) for path in sorted(found)]


def headline(result: Mapping[str, Any]) -> str:
    """Return the result on a checkpoint's card in words."""
    if "h_star" not in result:
        return "not evaluated"
    longest = max(result["hri"], key=int, default=None)
    worth = f"HRI_{longest} {result['hri'][longest]:.2f}, " if longest and result["hri"][longest] is not None else ""
    ended = f", ended by {result['h_star_ended_by']}" if result.get("h_star_ended_by") else ""
    reach = f"{worth}H* {result['h_star']} steps ({result['h_star_seconds']:.1f} s{ended})"
    return reach if result["valid"] else f"invalid verdict; {reach}"


def _described(path: Path, describe: Callable[[Path], str]) -> Entry:
    try:
        facts = describe(path)
    except (WorldlineError, KeyError, TypeError) as error:
        facts = f"unreadable: {error}"
    return Entry(path=path, facts=facts)


def _world_facts(path: Path) -> str:
    card = read_json(path / "world.json")
    weights = card["weights"]
    size = f"{weights['parameters'] / 1e6:.2f} M parameters, {_size(weights['bytes'])}"
    return f"{card['spec']['name']}, {size}; {headline(card['result'])}"


def _dataset_facts(path: Path) -> str:
    info = read_json(path / "meta/info.json")
    minutes = info["total_frames"] / info["fps"] / 60
    size = _size(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    return f"{info['total_episodes']} episodes, {info['total_frames']} frames, {minutes:.0f} min, {size}"


def _clips_facts(path: Path) -> str:
    card = read_json(path / "clips.json")
    shape = f"{card['num_clips']} clips of {card['num_frames']} frames at {card['image_size']} px as {card['codec']}"
    lost = f"{card['rejected_or_shortened']} of {card['entries']} entries rejected or shortened"
    return f"{shape}, {lost}, {_size(sum(file.stat().st_size for file in path.rglob('*') if file.is_file()))}"


def _run_facts(path: Path) -> str:
    checkpoint = path / "best" if (path / "best/world.json").exists() else path / "last"
    unfinished = "" if (path / "result.json").exists() else "unfinished; "
    return unfinished + _world_facts(checkpoint)


def _simulator(name: str) -> tuple[str, str]:
    package = _SIMULATOR_PACKAGE.get(name)
    if package is None:
        return name, "ready, nothing to install"
    return name, f"ready ({package})" if find_spec(package) else f"needs {package}: see worldline doctor"


def _presets() -> list[tuple[str, str]]:
    groups = sorted(path for path in (PACKAGE / "conf").iterdir() if path.is_dir())
    return [(f"{group.name}=", "|".join(sorted(file.stem for file in group.glob("*.yaml")))) for group in groups]


def _rows(root: Path, entries: list[Entry]) -> list[tuple[str, str]]:
    return [(str(entry.path.relative_to(root)), entry.facts) for entry in entries]


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return ["  none"]
    width = max(len(left) for left, _ in rows)
    return [f"  {left:<{width}}  {right}" for left, right in rows]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"
