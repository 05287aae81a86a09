from __future__ import annotations

from pathlib import Path

from worldline.engine.recording import Recording
from worldline.engine.workloads.device_world import Dtype
from worldline.engine.workloads.int8 import Int8Workload
from worldline.engine.workloads.latent import LatentWorkload, Mode
from worldline.model.int8 import is_bundle

WorldWorkload = LatentWorkload | Int8Workload


def open_workload(
    path_or_name: str | Path, mode: Mode = "auto", device: str = "cpu", dtype: Dtype = "float32"
) -> WorldWorkload:
    """Open a checkpoint, or a bundle of `worldline export`, with its starts.

    Raises:
        WorldlineError: as the workloads' own `open`.
    """
    return (
        Int8Workload.open(path_or_name)
        if is_bundle(path_or_name)
        else LatentWorkload.open(path_or_name, mode, device, dtype)
    )


def open_for(recording: Recording, path_or_name: str | Path | None = None) -> WorldWorkload:
    """Open what a recording was made with; another place of the checkpoint may be given.

    Raises:
        WorldlineError: as the workloads' own `open`.
    """
    made = recording.header.fingerprint
    if made.get("workload") == "int8":
        return Int8Workload.open(path_or_name or made.get("checkpoint", ""))
    return LatentWorkload.open_for(recording, path_or_name)
