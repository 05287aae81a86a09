"""Other people's models, in the form in which evaluation asks for a world.

Shape legend: b batch, c context, d latent, a action, k frame skip: environment steps that one step of the model lasts.
Time outside a foreign model is the environment's: its horizon counts environment steps, like everybody's.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec
from worldline.model.checkpoint import CARD, SHIPPED, load_world, weights_sha256
from worldline.model.int8 import CHECKPOINT
from worldline.model.lewm import CONFIG, read_lewm
from worldline.model.world import World

_ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class ForeignModel(Protocol):
    """What somebody else's model has to offer to be evaluated.

    Two attributes more are used where they exist: `image_size` (pixels along a side of the pictures that it wants, else
    the dataset's own) and `decode(z: (b, d)) -> (b, h, w, 3) uint8`.
    """

    context: int
    """Real latents that `begin` wants, k environment steps apart."""
    frame_skip: int
    """k."""

    def encode(self, frames: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]: ...

    def begin(self, z: Float[Tensor, "b c d"], actions: Float[Tensor, "b cm1 ka"]) -> Any:
        """Return a state after real latents; `actions[:, i]` are the k native actions, one after the other, that lead
        from latent i to latent i + 1."""
        ...

    def step(self, state: Any, action: Float[Tensor, "b ka"]) -> Any:
        """Imagine one step and return the new state, whose `z` is the predicted latent (b, d)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ForeignConfig:
    source: str
    """The path or the `module:callable` it came from."""
    image_size: int
    context: int
    frame_skip: int
    latent_dim: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ForeignWorld:
    """Somebody else's model with every value that crosses its border checked.

    Raises:
        WorldlineError: it lacks something that evaluation needs, or returns another shape than the protocol says.
    """

    def __init__(self, model: Any, spec: WorldSpec, *, source: str, sha256: str, num_parameters: int | None) -> None:
        self.model: ForeignModel = model
        self.spec = spec
        self.sha256, self.num_parameters = sha256, num_parameters
        for name in ("encode", "begin", "step"):
            if not callable(getattr(model, name, None)):
                raise WorldlineError(
                    f"{source}: a model has encode(frames), begin(z, actions) and step(state, action), got a "
                    f"{type(model).__name__} without {name}"
                )
        for name in ("context", "frame_skip"):
            value = getattr(model, name, None)
            if not isinstance(value, int) or value < 1:
                raise WorldlineError(f"{source}: the model's {name} should be a whole number from 1, got {value!r}")
        size = getattr(model, "image_size", None) or spec.image_size
        with torch.inference_mode():
            z = model.encode(torch.zeros(2, size, size, 3, dtype=torch.uint8))
        if not isinstance(z, Tensor) or z.ndim != 2:
            raise WorldlineError(_refusal(source, "encode", "float latents (2, d) of 2 pictures", z))
        self.config = ForeignConfig(
            source=source,
            image_size=size,
            context=model.context,
            frame_skip=model.frame_skip,
            latent_dim=z.shape[1],
        )

    @property
    def has_decoder(self) -> bool:
        return callable(getattr(self.model, "decode", None))

    def encode(self, frames: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        z = self._latents("encode", self.model.encode(frames), len(frames))
        if not torch.isfinite(z).all():
            raise WorldlineError(f"{self.config.source}: encode should return finite latents, got NaN or inf")
        return z

    def begin(self, z: Float[Tensor, "b c d"], actions: Float[Tensor, "b cm1 ka"]) -> Any:
        return self.model.begin(z, actions)

    def rollout(self, state: Any, actions: Float[Tensor, "b t ka"]) -> Float[Tensor, "b t d"]:
        """Imagine `t` steps of the model open loop: row i is the latent after the first k (i + 1) actions."""
        predictions = []
        for action in actions.unbind(1):
            state = self.model.step(state, action)
            predictions.append(self._latents("step", getattr(state, "z", None), len(action)))
        return torch.stack(predictions, dim=1)

    def decode(self, z: Float[Tensor, "b d"]) -> UInt8[Tensor, "b h w 3"]:
        frames = self.model.decode(z)  # type: ignore[attr-defined]
        if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or frames.shape[::3] != (len(z), 3):
            expected = f"uint8 pictures ({len(z)}, h, w, 3)"
            raise WorldlineError(_refusal(self.config.source, "decode", expected, frames))
        return frames

    def _latents(self, method: str, z: Any, count: int) -> Float[Tensor, "b d"]:
        shape = (count, self.config.latent_dim)
        if not isinstance(z, Tensor) or z.shape != shape or not z.is_floating_point():
            what = "a state whose z holds " if method == "step" else ""
            raise WorldlineError(_refusal(self.config.source, method, f"{what}float latents {shape}", z))
        return z.float().cpu()


def _refusal(source: str, method: str, expected: str, got: Any) -> str:
    if isinstance(got, Tensor):
        shown = f"{str(got.dtype).removeprefix('torch.')} {tuple(got.shape)}"
    else:
        shown = "None" if got is None else f"a {type(got).__name__}"
    return f"{source}: {method} should return {expected}, got {shown}; docs/evaluate.md has the protocol"


AnyWorld = World | ForeignWorld


def frame_skip(world: AnyWorld) -> int:
    """Return how many environment steps one step of a world lasts; ours have one."""
    return world.config.frame_skip if isinstance(world, ForeignWorld) else 1


def context_frames(world: AnyWorld) -> int:
    """Return how many consecutive frames of the environment a world's context spans."""
    return (world.config.context - 1) * frame_skip(world) + 1


def weights_fingerprint(world: AnyWorld) -> str:
    return world.sha256 if isinstance(world, ForeignWorld) else weights_sha256(world)


def num_parameters(world: AnyWorld) -> int | None:
    return world.num_parameters if isinstance(world, ForeignWorld) else sum(p.numel() for p in world.parameters())


def is_foreign(name: str) -> bool:
    """Return whether this names somebody else's model: an entry point, a file, or a folder with `config.json`."""
    path = Path(name)
    if any(
        (place / CARD).exists() for place in (path, path / "best", path / "last", path / CHECKPOINT, SHIPPED / path)
    ):
        return False
    return path.is_file() or (path / CONFIG).exists() or _ENTRY_POINT.fullmatch(name) is not None


def load_any(
    name: str, spec: WorldSpec, *, actions: Float32[np.ndarray, "n a"], allow_pickled_code: bool = False
) -> AnyWorld:
    """Load one of our worlds, a LeWM checkpoint, or what `module:callable` returns when it is called.

    `spec` and `actions` (of training episodes) are the dataset's: a LeWM checkpoint knows neither.

    Raises:
        WorldlineError: there is no such model, or it is not what it should be.
    """
    if not is_foreign(name):
        return load_world(name)
    path = Path(name)
    if path.exists():
        lewm, sha256 = read_lewm(path, actions=actions, allow_pickled_code=allow_pickled_code)
        return ForeignWorld(lewm, spec, source=name, sha256=sha256, num_parameters=lewm.parameters)
    make, file = _entry_point(name)
    model = make()
    if isinstance(model, nn.Module):
        model.eval().requires_grad_(False)
        count = sum(p.numel() for p in model.parameters())
        return ForeignWorld(
            model,
            spec,
            source=name,
            sha256=weights_sha256(model),
            num_parameters=count,
        )
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return ForeignWorld(model, spec, source=name, sha256=sha256, num_parameters=None)


def _entry_point(name: str) -> tuple[Any, Path]:
    """Import `module:callable`, the working directory first, and return it with its module's file."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the user's module lacks something: their traceback says where
        raise WorldlineError(
            f"{name}: no module {module_name!r} in the working directory or installed; expected module:callable"
        ) from None
    finally:
        sys.path.remove(str(Path.cwd()))
    file = getattr(found, "__file__", None)
    if file is None:
        raise WorldlineError(f"{name}: {module_name} has no source file; expected module:callable of a module of yours")
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise WorldlineError(f"{name}: {file} defines no {attribute!r}; expected module:callable")
        found = getattr(found, part)
    if not callable(found):
        raise WorldlineError(f"{name}: expected something to call, got a {type(found).__name__}")
    return found, Path(file)
