"""Export a world: a folder that Python plays and evaluates, and that compiles for a microcontroller."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray

from worldline.core.errors import WorldlineError
from worldline.core.files import fsync_directory, read_json, sha256_file, write_bytes, write_json
from worldline.core.result import provenance
from worldline.core.seeding import rng_for
from worldline.data.cache import FrameCache
from worldline.data.lerobot import Dataset, open_dataset
from worldline.edge.arena_picture import draw, world_panel
from worldline.edge.firmware import TARGETS, WATCHING, run_in_qemu, write_firmware
from worldline.edge.graph import Chain
from worldline.edge.program import lay_out, write_world
from worldline.edge.quantise import Calibration, quantise
from worldline.edge.schedule import pareto, plan_rows
from worldline.edge.sensitivity import sensitivity
from worldline.edge.world import IntegerWorld
from worldline.model.checkpoint import find_world, load_world, read_card
from worldline.model.int8 import CHECKPOINT, FORMAT, MANIFEST, PROGRAM, is_bundle
from worldline.model.world import World

_STEPS, _VALIDATED = 100, 24


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, and what to measure its ranges on."""

    checkpoint: str
    """A checkpoint, a run, or a shipped world's name."""
    data: Path
    """A dataset of the same world; its training episodes give the ranges."""
    out: Path
    """Where the bundle goes; it must not exist."""
    target: Literal["host", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55"] = "host"
    """What the bundle's CMakeLists.txt compiles for (host: an example for cortex-m4), and what --qemu runs."""
    bits: int = 8
    """That a weight of the GRU, of the map behind it and of the decoder's first takes: 8, or 4 for less flash."""
    frames: int = 512
    """Real pictures that activations are measured on."""
    rollouts: int = 64
    """Rollouts of up to 100 steps that the recurrent latent's range is measured on."""
    seed: int = 0
    """Of the choice of frames and rollouts."""
    ram_bytes: int = 128 * 1024
    """RAM that the arena may take; a world that wants more is refused."""


def export(config: ExportConfig, qemu: bool = False) -> Path:
    """Quantise a world and write its bundle, whole or not at all; with `qemu`, run its firmware first.

    Raises:
        WorldlineError: `out` exists, the data is of another world or too short, or TinyEngine cannot run the world.
    """
    if qemu and config.target not in TARGETS:
        raise WorldlineError(f"--qemu runs firmware; give one of target={', '.join(TARGETS)}")
    if config.out.exists():
        raise WorldlineError(f"{config.out} exists already; choose another place with out=, or remove it first")
    if is_bundle(config.checkpoint):
        raise WorldlineError(f"{config.checkpoint} is an exported bundle already; give the checkpoint it was made from")
    world, dataset = load_world(config.checkpoint), open_dataset(config.data)
    if world.spec.name != dataset.spec.name:
        raise WorldlineError(
            f"{config.checkpoint} is a world of {world.spec.name}, {config.data} holds episodes of "
            f"{dataset.spec.name}; measure its ranges on data of its own world"
        )
    whole = quantise(world, calibration(world, dataset, config), config.bits)
    if (wanted := lay_out(whole).size) > config.ram_bytes:
        raise WorldlineError(
            f"the arena takes {wanted:,} bytes of RAM, ram_bytes={config.ram_bytes:,} are allowed; no plan "
            "wants less than rows; train with a smaller model.conv_width= or model.decoder_width="
        )
    held_out = _windows(world, dataset, "validation", _VALIDATED, config.seed)
    cost = quality(world, whole, *held_out)
    at = f"error to truth after {cost['steps']} steps {cost['error_ratio']:.2f} of the float world's"
    print(f"held-out latents: cosine {cost['cosine_mean']:.4f} (worst percent {cost['cosine_p1']:.4f}); {at}")
    cost["layers"] = layer_costs(world, whole, *held_out)
    print("plans of the encoder, bytes of RAM and times the multiplications: " + "; ".join(plans(whole.encoder)))
    measured = {"data": dataset.fingerprint} | {
        name: getattr(config, name) for name in ("bits", "frames", "rollouts", "seed")
    }
    return write_bundle(config.out, find_world(config.checkpoint), whole, measured, cost, config.target, qemu)


def write_bundle(
    out: Path,
    checkpoint: Path,
    world: IntegerWorld,
    calibration: dict[str, Any],
    quality: dict[str, Any] | None = None,
    target: str = "host",
    qemu: bool = False,
) -> Path:
    """Write the bundle of a quantised world, whole or not at all; `calibration` says what it was measured on."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, checkpoint, world, {"calibration": calibration, "quality": quality}, target, qemu)
        os.rename(temporary, out)
        fsync_directory(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def bundle_for(checkpoint: str) -> Path:
    """Return a checkpoint's bundle, `runs/NAME-int8`, made now if there is none.

    Raises:
        WorldlineError: another checkpoint's bundle lies there, or the dataset it was trained on is not here.
    """
    if is_bundle(checkpoint):
        return Path(checkpoint)
    card, place = read_card(checkpoint), Path("runs") / f"{Path(checkpoint).name}-int8"
    if place.exists():
        if not is_bundle(place) or read_json(place / MANIFEST).get("weights") != card["weights"]["sha256"]:
            raise WorldlineError(
                f"{place} is not the bundle of {checkpoint}; move it away, or play a bundle by its own path"
            )
        return place
    data = Path(str(card["training"].get("config", {}).get("data") or "-"))
    if not data.is_dir():
        raise WorldlineError(
            f"{checkpoint} has no bundle, and the data it was trained on ({data}) is not here to measure ranges on; "
            f"make one with: worldline export {checkpoint} data=DATASET"
        )
    print(f"{place}: exporting {checkpoint}, once")
    return export(ExportConfig(checkpoint=checkpoint, data=data, out=place))


def calibration(world: World, dataset: Dataset, config: ExportConfig) -> Calibration:
    """Choose frames and rollouts from training episodes.

    Raises:
        WorldlineError: no training episode is long enough.
    """
    context = world.config.context
    seen, actions = _windows(world, dataset, "train", config.rollouts, config.seed)
    rng, steps = rng_for(config.seed, "calibration frames"), seen.shape[1]
    share = -(-config.frames // config.rollouts)
    pictures = [clip[np.sort(rng.choice(steps, min(share, steps), replace=False))] for clip in seen]
    frames = torch.from_numpy(np.concatenate(pictures)[: config.frames])
    with torch.inference_mode():
        beginnings = world.encode(torch.from_numpy(seen[:, :context]))
    return Calibration(frames, beginnings.clone(), torch.from_numpy(actions))


def quality(
    world: World, whole: IntegerWorld, seen: UInt8[np.ndarray, "b f h w 3"], native: Float32[np.ndarray, "b t a"]
) -> dict[str, Any]:
    """Compare with the float world: cosine of encoded latents, and errors to truth at the end of a rollout (whitened
    latents), over the float world's."""
    context, scale = world.config.context, whole.scale
    with torch.inference_mode():
        real = world.encode(torch.from_numpy(seen))
        ours = whole.encode(seen.reshape(-1, *seen.shape[2:])).reshape(real.shape)
        actions = torch.from_numpy(native)
        begun = world.begin(real[:, :context], actions[:, : context - 1])
        theirs = world.rollout(begun, actions[:, context - 1 :])[:, -1]
        whole_actions = whole.actions.run(native)
        state = whole.begin(ours[:, :context], whole_actions[:, : context - 1])
        for action in whole_actions[:, context - 1 :].transpose(1, 0, 2):
            state = whole.step(state, action)
        z_hat = torch.from_numpy(state.z * np.float32(scale))
        cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(ours * np.float32(scale)), real, dim=-1)
        ratio = world.gauge.error(z_hat, real[:, -1]).mean() / world.gauge.error(theirs, real[:, -1]).mean()
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_p1": float(torch.quantile(cosine.flatten(), 0.01)),
        "error_ratio": float(ratio),
        "steps": seen.shape[1] - context,
        "rollouts": len(seen),
    }


def layer_costs(
    world: World, whole: IntegerWorld, seen: UInt8[np.ndarray, "b f h w 3"], native: Float32[np.ndarray, "b t a"]
) -> list[dict[str, Any]]:
    """Return what each layer's integers cost by themselves, on the same windows."""
    with torch.inference_mode():
        begun = world.encode(torch.from_numpy(seen[:, : world.config.context])).clone()
    frames = torch.from_numpy(seen[:, :: max(1, seen.shape[1] // 2)].reshape(-1, *seen.shape[2:]))
    return sensitivity(world, whole, frames, begun, torch.from_numpy(native))


def _windows(
    world: World, dataset: Dataset, split: str, count: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return pictures (count, context + steps, h, w, 3) and the actions between them, of up to 100 steps.

    Raises:
        WorldlineError: no episode is long enough.
    """
    cache, context = FrameCache(dataset, world.config.image_size), world.config.context
    episodes = dataset.split(split)
    steps = min(_STEPS, max((dataset.lengths[e] for e in episodes), default=0) - context)
    long = [e for e in episodes if dataset.lengths[e] >= context + steps]
    if steps < 1:
        raise WorldlineError(f"{dataset.path}: no {split} episode has more than {context} frames; collect longer ones")
    rng, seen, actions = rng_for(seed, f"{split} windows"), [], []
    for _ in range(count):
        episode = long[int(rng.integers(len(long)))]
        start = int(rng.integers(0, dataset.lengths[episode] - context - steps + 1))
        seen.append(cache.frames(episode, start, context + steps))
        actions.append(np.asarray(dataset.actions(episode), np.float32)[start : start + context + steps - 1])
    return np.stack(seen), np.stack(actions)


def plans(chain: Chain) -> list[str]:
    """Return every plan worth having, in words: rows, then those that keep the picture and that no other beats."""
    named = [("rows", plan_rows(chain))]
    for plan in pareto(chain, keep_picture=True):
        tiled = f"{plan.num_tiled} stages in tiles of {plan.tile[0]} x {plan.tile[1]}"
        named.append((tiled if plan.num_tiled else "layer by layer", plan))
    return [f"{name} {plan.size:,} x {plan.macs / chain.macs:.2f}" for name, plan in named]


def sizes(world: IntegerWorld, program: bytes, watching: bytes, arena_bytes: int) -> dict[str, Any]:
    """Return what the world takes: flash for the program, RAM for the arena, multiplications for each call."""
    p = world.predictor
    step = sum(m.weight.size for m in (p.embed, p.input_gates, p.hidden_gates, p.from_hidden, p.from_input, p.change))
    return {
        "program_bytes": len(program),
        "watching_bytes": len(watching),
        "arena_bytes": arena_bytes,
        "encoder_arena_bytes": plan_rows(world.encoder).size,
        "decoder_arena_bytes": plan_rows(world.decoder).size,
        "encode_macs": world.encoder.macs,
        "step_macs": step,
        "decode_macs": world.decoder.macs + world.drawing.matrix.weight.size,
        "plans": plans(world.encoder),
    }


def _write(out: Path, checkpoint: Path, world: IntegerWorld, measured: dict[str, Any], target: str, qemu: bool) -> None:
    program, arena_bytes = write_world(world)
    out.mkdir(parents=True)
    shutil.copytree(checkpoint, out / CHECKPOINT, ignore=shutil.ignore_patterns("training.*"))
    write_bytes(out / PROGRAM, program)
    watching = write_tables(out, world)
    panel = world_panel("Arena", world.encoder, world.decoder, lay_out(world))
    write_bytes(out / "arena.svg", draw([panel]).encode())
    spec, taken = read_card(checkpoint)["spec"], sizes(world, program, watching, arena_bytes)
    ran = run_in_qemu(world, taken, out, target) if qemu else None
    write_firmware(out, world, spec["name"], tuple(spec["action_names"]), target, taken, ran, measured["quality"])
    files = sorted(path for path in out.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "version": 1,
        "world": spec["name"],
        "weights": read_card(checkpoint)["weights"]["sha256"],
        "scale": world.scale,
        "arena_bytes": arena_bytes,
        "sizes": taken,
        "qemu": ran,
        **measured,
        "files": {str(path.relative_to(out)): sha256_file(path) for path in files},
        "provenance": provenance(),
    }
    write_json(out / MANIFEST, manifest)


def write_tables(out: Path, world: IntegerWorld) -> bytes:
    """Write a world's program as a table of constants, and another without the decoder, which is returned."""
    write_table(out, *write_world(world))
    (out / WATCHING).mkdir(parents=True, exist_ok=True)
    watching, arena_bytes = write_world(world, decoder=False)
    write_table(out / WATCHING, watching, arena_bytes)
    return watching


def write_table(out: Path, program: bytes, arena_bytes: int) -> None:
    """Write the program as a table of constants, which a linker puts into flash."""
    words = np.frombuffer(program + bytes(-len(program) % 8), "<u8")
    lines = [", ".join(f"0x{word:016x}" for word in words[i : i + 6]) for i in range(0, len(words), 6)]
    write_bytes(
        out / "world_program.hpp",
        (
            "// The world's program, and how much memory it wants. Written by worldline export.\n"
            "#ifndef WORLD_PROGRAM_HPP\n#define WORLD_PROGRAM_HPP\n\n#include <stddef.h>\n#include <stdint.h>\n\n"
            f"constexpr size_t kWorldProgramBytes = {len(program)};\n"
            f"constexpr size_t kWorldArenaBytes = {arena_bytes};\n"
            "extern const uint64_t world_program[];\n\n#endif\n"
        ).encode(),
    )
    body = ",\n".join(lines)
    write_bytes(
        out / "world_program.cpp",
        f'#include "world_program.hpp"\n\nalignas(16) const uint64_t world_program[] = {{\n{body}}};\n'.encode(),
    )
