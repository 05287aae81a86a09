"""What `worldline plan-memory` found: as figures, and in words from these alone."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from worldline.core.files import read_json, write_bytes
from worldline.core.result import write_result
from worldline.model.video import MaskedVideo
from worldline.train.memory import GB, LARGEST, Choice, Need, PlanMemoryConfig


def figures(config: PlanMemoryConfig, choices: list[Choice]) -> dict[str, Any]:
    """Return the plan as plain JSON values, bytes in `need`."""
    with torch.device("meta"):
        whole = MaskedVideo(config.model)
    return {
        "gpus": config.gpus,
        "memory_gb": config.memory_gb,
        "reserve_gb": config.reserve_gb,
        "model": config.model.to_json(),
        "target": config.learner.target,
        "weights": sum(p.numel() for p in whole.parameters()),
        "encoder_weights": sum(p.numel() for p in whole.encoder.parameters()),
        "grid": list(config.model.grid),
        "choices": [asdict(choice) for choice in choices],
    }


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write `result.json` and `report.md`."""
    write_result(folder / "result.json", "memory", found, {"cpu_seconds": time.process_time()})
    write_bytes(folder / "report.md", render(read_json(folder / "result.json")).encode())


def render(result: dict[str, Any]) -> str:
    """Write the report from `result.json` alone."""
    made, model = result["provenance"], result["model"]
    lines = [
        f"# What fits into {_gpus(result)} of {result['memory_gb']:g} GB",
        "",
        f"A video transformer of {model['width']} channels and {model['depth']} blocks, clips of {model['frames']} "
        f"frames of {model['image_size']} px, target `{result['target']}`: bytes of tensors, counted in an update of "
        "one rank on tensors that have shapes and no bytes. What a GPU's own allocator said: docs/phases/gpu.md.",
        "",
        "```",
        text(result),
        "```",
        "",
        f"Torch {made['versions'].get('torch')}; commit {made['commit']}; "
        f"{result['timing']['cpu_seconds'] / 60:.1f} minutes of CPU time.",
        "",
        f"Again: `{made['command']}`",
        "",
    ]
    return "\n".join(lines)


def text(found: dict[str, Any]) -> str:
    """Say which settings fit, and where the bytes of the best of them come from."""
    best = max(found["choices"], key=lambda choice: (choice["clips"] > 0, not choice["offload"], choice["clips"]))
    lines = [
        f"{_gpus(found)} of {found['memory_gb']:g} GB, {found['reserve_gb']:g} GB kept free: "
        f"{found['memory_gb'] - found['reserve_gb']:g} GB for a rank's tensors",
        "",
        "checkpointing  offload  clips a rank   on the GPU  on the host",
    ]
    for choice in found["choices"]:
        device, host = on_device_and_host(choice)
        clips = str(choice["clips"]) if choice["clips"] else "none fits"
        if choice["clips"] == LARGEST:
            clips += " or more"
        lines.append(
            f"{_yes(choice['checkpointing']):<13}  {_yes(choice['offload']):<7}  {clips:<12}  {device / GB:>8.2f} GB  "
            f"{host / GB:>8.2f} GB"
        )
    chosen = f"checkpointing {_yes(best['checkpointing'])}, offload {_yes(best['offload'])}"
    lines += ["", f"{chosen}, {max(1, best['clips'])} clip(s) a rank; where it is:"]
    where = ("parameters", "average", "optimizer", "gradients") if best["offload"] else ()
    for name, words in _arithmetic(found).items():
        place = "host" if name in where else "GPU"
        lines.append(f"  {name:<12} {best['need'][name] / GB:>8.3f} GB  {place:<4}  {words}")
    if best["clips"]:
        options = [f"batch={best['clips'] * found['gpus']}"]
        options += [f"parallel.{name}=true" for name in ("checkpointing", "offload") if best[name]]
        larger = "; a larger batch with parallel.accumulate=N" if found["target"] == "ema" else ""
        lines += ["", f"options: {' '.join(options)}{larger}"]
    return "\n".join(lines)


def on_device_and_host(choice: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of a setting on the GPU and those that offloading keeps on the host."""
    need = Need(**choice["need"])
    device = need.on_device(choice["offload"])
    return device, need.total - device


def _arithmetic(found: dict[str, Any]) -> dict[str, str]:
    """Return the arithmetic of each thing that a rank holds, in words."""
    weights, encoder = found["weights"], found["encoder_weights"]
    per = f"/ {found['gpus']} ranks" if found["gpus"] > 1 else "on one rank"
    times, rows, cols = found["grid"]
    return {
        "parameters": f"4 B x {weights:,} weights {per}",
        "average": f"4 B x {encoder:,} weights of the encoder {per}",
        "optimizer": f"8 B x {weights:,} weights {per}",
        "gradients": f"4 B x those of {weights:,} that are there at the worst moment {per}",
        "gathered": "weights of the blocks at work, whole",
        "activations": f"{times} x {rows} x {cols} = {times * rows * cols} tokens a clip",
    }


def _gpus(found: dict[str, Any]) -> str:
    return "1 GPU" if found["gpus"] == 1 else f"{found['gpus']} GPUs"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
