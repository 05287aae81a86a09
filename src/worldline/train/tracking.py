"""What a training shows to Weights & Biases or TensorBoard, beside the files of its run, which stay the truth.

Both work without a network: TensorBoard writes event files, and `WANDB_MODE=offline` keeps everything in the run's
`wandb/`, from where `wandb sync` sends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from worldline.core.errors import WorldlineError

Tracking = Literal["none", "tensorboard", "wandb"]


@runtime_checkable
class Tracker(Protocol):
    """Somebody who wants to see a run's numbers and pictures."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, draw: Callable[[], Image.Image]) -> None: ...
    def finish(self, name: str, files: Sequence[Path]) -> None:
        """Hear that the run is finished, and which files it was for."""
        ...

    def close(self) -> None: ...


def open_tracker(kind: Tracking, run: Path, config: dict[str, Any], project: str, step: int) -> Tracker:
    """Return who follows a run from `step` on; the same run goes on in the same place when it is resumed.

    Raises:
        WorldlineError: the package is not installed.
    """
    if kind == "none":
        return _Nobody()
    try:
        return _WandB(run, config, project) if kind == "wandb" else _TensorBoard(run, step)
    except ImportError as error:
        package = "wandb" if kind == "wandb" else "tensorboard"
        raise WorldlineError(
            f"track={kind} wants a package that is not here ({error}): pip install -c constraints.txt {package}"
        ) from None


def flatten(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a line of metrics by dotted name; words are left out."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[prefix + name] = float(value)
    return found


class _Nobody:
    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, draw: Callable[[], Image.Image]) -> None: ...
    def finish(self, name: str, files: Sequence[Path]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """Event files in RUN/tensorboard; what an interrupted run told past the step that it resumes from is taken back."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, draw: Callable[[], Image.Image]) -> None:
        self._writer.add_image(name, np.asarray(draw()), step, dataformats="HWC")

    def finish(self, name: str, files: Sequence[Path]) -> None:
        self._writer.add_text(name, "  \n".join(map(str, files)))

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, kept in RUN/wandb; its id follows from the run's path, so that it can go on."""

    def __init__(self, run: Path, config: dict[str, Any], project: str) -> None:
        import wandb

        self._wandb = wandb
        name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
        self._run = wandb.init(project=project, name=run.name, id=name, resume="allow", dir=str(run), config=config)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, draw: Callable[[], Image.Image]) -> None:
        self._run.log({name: self._wandb.Image(draw())}, step=step)

    def finish(self, name: str, files: Sequence[Path]) -> None:
        artifact = self._wandb.Artifact(f"{name}-{self._run.id}", type="model")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()
