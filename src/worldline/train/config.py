"""What a training run is made of: two stages, each with its own steps, batch, losses and learning rates."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from worldline.core.errors import WorldlineError, require_at_least
from worldline.model.world import WorldConfig
from worldline.train.tracking import Tracking

_ENCODER_TERMS = ("sigreg", "features", "straightening", "variance", "covariance", "time_similarity")
_ROLLOUT_TERMS = ("excess_growth", "rollout_sigreg", "rollout_inverse")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training. A weight of 0 switches a term off, and its cost with it.

    The default of an option is what stages did before there was one: runs of that time go on with it.
    """

    steps: int
    """Updates; 0 skips the stage."""
    batch: int
    """Windows an update."""
    rollout: int
    """Steps that a window is rolled out beyond the context."""
    rollout_start: int = 0
    """Rolled-out steps at the first update, growing evenly to `rollout`; 0 means `rollout` from the start."""
    rollout_ramp: float = 0.5
    """Share of the stage's updates after which the full rollout is reached."""
    target_stride: int = 1
    """Encode only every so many-th frame of a rollout as a target (the joint stage only, where encoding costs most)."""

    one_step: float = 0.0
    """Weight of the teacher-forced one-step latent error."""
    own_rollout: float = 1.0
    """Weight of the latent error along the model's own rollout."""
    sigreg: float = 0.0
    """Weight of SIGReg, which holds latents near N(0, I)."""
    sigreg_per_step: bool = False
    """Sketch every time step of the batch by itself, as the source does, instead of all frames together."""
    grounding: float = 0.0
    """Weight of the pixel error of decoded real latents."""
    rollout_pixels: float = 0.0
    """Weight of the pixel error of decoded rolled-out latents."""
    features: float = 0.0
    """Weight of telling a picture's features, edges and pixels whitened, from its latent (the joint stage only)."""
    loose_frames: int = 0
    """Single frames an update, each moved and mirrored at random, that `features` sees beside the windows': an encoder
    that only sees a dataset's own places learns them by heart (the joint stage only)."""
    inverse_dynamics: float = 0.0
    """Weight of telling the action from two latents in a row."""
    straightening: float = 0.0
    """Weight of 1 - cos between a latent's steps in a row (the joint stage only)."""
    variance: float = 0.0
    """Weight of the latents' standard deviations' falling short of 1 (the joint stage only)."""
    covariance: float = 0.0
    """Weight of the latents' squared covariances (the joint stage only)."""
    time_similarity: float = 0.0
    """Weight of the latents' squared steps (the joint stage only)."""
    excess_growth: float = 0.0
    """Weight of the rollout error's growing faster than real neighbours part (the frozen stage only)."""
    rollout_sigreg: float = 0.0
    """Weight of SIGReg on rolled-out latents, whitened like real ones, at 8 random steps (the frozen stage only)."""
    rollout_sigreg_from: int = 1
    """The first step of a rollout that `rollout_sigreg` looks at. Where much cannot be predicted, spreading costs
    accuracy, and late steps have the least of it to lose."""
    rollout_inverse: float = 0.0
    """Weight of telling the action from two rolled-out latents in a row, by the head that `inverse_dynamics` trains on
    real ones (the frozen stage only)."""

    error: Literal["l2", "l1", "log"] = "l2"
    """Squared or absolute latent errors in `one_step` and `own_rollout`, or the logarithm of each step's mean squared
    error, which counts the first ten steps of a rollout more than the next ninety."""
    pushforward_noise: float = 0.0
    """Standard deviation of the noise on the real latents that the predictor is given, so that it learns to correct."""
    prediction_share: float = 0.03
    """Share of the prediction terms' gradient that reaches the encoder: 0 is none, 1 is all."""
    pixel_frames: int = 128
    """Frames an update that the pixel terms decode, drawn from the batch."""
    foreground: float = 0.0
    """Extra weight of a pixel that is as far from the dataset's background as black from white."""
    motion: float = 0.0
    """Extra weight of a pixel that changes between neighbouring looked-at frames from black to white."""
    latent_noise: float = 0.0
    """Standard deviation of the noise on latents that `grounding` and `features` read: near latents must mean near
    pictures."""
    projections: int = 256
    """Random directions of SIGReg."""

    lr_encoder: float = 1e-3
    """Highest learning rate of the encoder, and of the heads that only training has."""
    lr_predictor: float = 1e-3
    """Highest learning rate of the predictor."""
    lr_decoder: float = 1e-3
    """Highest learning rate of the decoder."""
    warmup: int = 100
    """Updates over which learning rates rise from 0; then they fall along a cosine to `lr_end` of their height."""
    lr_end: float = 0.01
    """Last learning rate, as a share of the highest."""
    weight_decay: float = 1e-3
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    ema: float = 0.0
    """Decay of an averaged copy of the weights, which is then what is validated and kept; 0 is none."""
    bfloat16: bool = False
    """Compute in bfloat16 where autocast deems it safe."""

    def __post_init__(self) -> None:
        least = {
            "steps": 0,
            "batch": 1,
            "rollout": 1,
            "rollout_start": 0,
            "rollout_sigreg_from": 1,
            "target_stride": 1,
            "pixel_frames": 1,
            "warmup": 0,
        }
        require_at_least(self, least, "a stage's ")
        for name in ("prediction_share", "rollout_ramp", "lr_end", "ema"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise WorldlineError(f"a stage's {name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.target_stride > (shortest := self.rollout_start or self.rollout):
            raise WorldlineError(
                f"target_stride must be at most the shortest rollout {shortest}, got {self.target_stride}"
            )
        if self.rollout_sigreg and self.rollout_sigreg_from > self.rollout:
            raise WorldlineError(
                f"rollout_sigreg_from must be at most rollout {self.rollout}, got {self.rollout_sigreg_from}"
            )
        if self.rollout_start > self.rollout:
            raise WorldlineError(f"rollout_start must be at most rollout {self.rollout}, got {self.rollout_start}")


def _joint() -> StageConfig:
    """The encoder keeps what the picture shows, features and pixels, noisy latents and all, and tells the actions;
    prediction hardly shapes it."""
    return StageConfig(
        steps=9000,
        batch=24,
        rollout=4,
        target_stride=4,
        sigreg=0.02,
        grounding=100.0,
        pixel_frames=48,
        foreground=20.0,
        motion=40.0,
        features=25.0,
        loose_frames=96,
        latent_noise=0.1,
        inverse_dynamics=5.0,
        lr_encoder=2e-3,
        lr_decoder=2e-3,
        weight_decay=0.02,
        clip=5.0,
        bfloat16=True,
    )


def _frozen() -> StageConfig:
    """The predictor learns from its own long rollouts, the decoder to draw what the encoder keeps."""
    return StageConfig(
        steps=4000,
        batch=96,
        rollout=100,
        rollout_start=16,
        grounding=10.0,
        foreground=20.0,
        motion=40.0,
        latent_noise=0.1,
        lr_decoder=2e-3,
        clip=5.0,
        bfloat16=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: first the encoder with a predictor, then predictor and decoder on frozen latents."""

    data: Path
    """The dataset, a LeRobot v3 directory."""
    path: Path
    """The run directory to write. An unfinished run there goes on where it stopped; a finished one is never touched."""
    model: WorldConfig = field(default_factory=WorldConfig)
    encoder: Path | None = None
    """A checkpoint or run whose encoder and decoder are where training starts, instead of new ones. With joint.steps=0
    they stay as they are, and predictors trained in different ways can be compared on the same latents."""
    pretrained: Path | None = None
    """A finished `worldline pretrain` run whose encoder the world sees with; model.encoder and model.vit_* are then
    its."""
    tune: float = 0.0
    """Learning rate of the pretrained weights over lr_encoder; 0 leaves them as they are."""
    joint: StageConfig = field(default_factory=_joint)
    """Encoder and predictor, and with `grounding` the decoder, on pictures."""
    frozen: StageConfig = field(default_factory=_frozen)
    """The predictor, over long rollouts, and with `grounding` the decoder, on latents encoded once."""
    seed: int = 0
    """Of the first weights, the order of the data and all noise."""
    threads: int = 1
    """CPU threads to compute with: one is fastest for small worlds, and the loader has its own; 0 leaves torch's own
    choice. Resuming is exact only with the same number."""
    device: Literal["cpu", "cuda"] = "cpu"
    log_every: int = 20
    """Updates between two lines of metrics."""
    checkpoint_every: int = 500
    """Updates between two validations, each followed by a checkpoint."""
    validation_windows: int = 64
    """Held-out windows that a validation rolls out."""
    track: Tracking = "none"
    """Show metrics, pictures and the best checkpoint to TensorBoard or Weights & Biases, too."""
    track_project: str = "worldline"
    """The project in Weights & Biases."""

    def __post_init__(self) -> None:
        require_at_least(self, {"threads": 0, "log_every": 1, "checkpoint_every": 1, "validation_windows": 1})
        if self.joint.steps + self.frozen.steps == 0:
            raise WorldlineError("joint.steps and frozen.steps are both 0; there is nothing to train")
        for stage, name, names, why in (
            (self.frozen, "frozen", _ENCODER_TERMS, "leaves the encoder alone"),
            (self.joint, "joint", _ROLLOUT_TERMS, "has no fixed latents to measure rollouts by"),
        ):
            if given := [term for term in names if getattr(stage, term)]:
                raise WorldlineError(f"the {name} stage {why}: {name}.{given[0]} must be 0")
        if self.frozen.rollout_inverse and not self.frozen.inverse_dynamics:
            raise WorldlineError(
                "frozen.rollout_inverse reads rollouts by the head that frozen.inverse_dynamics trains; give both"
            )
        if self.pretrained is not None and self.encoder is not None:
            raise WorldlineError("encoder and pretrained both say what the world sees with; give one of them")
        if not 0.0 <= self.tune <= 1.0:
            raise WorldlineError(f"tune must lie between 0 and 1, got {self.tune}")
        if self.frozen.target_stride != 1:
            raise WorldlineError("the frozen stage has every latent at hand; its target_stride must be 1")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        data = asdict(self) | {
            "data": str(self.data),
            "path": str(self.path),
            "encoder": self.encoder and str(self.encoder),
            "pretrained": self.pretrained and str(self.pretrained),
        }
        return dict(json.loads(json.dumps(data)))


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config with the options that came later, each at its field's own default."""
    parts = {"model": WorldConfig, "joint": StageConfig, "frozen": StageConfig}
    filled = _defaults(TrainConfig) | config
    return filled | {name: _defaults(kind) | filled.get(name, {}) for name, kind in parts.items()}


def _defaults(kind: type[TrainConfig | StageConfig | WorldConfig]) -> dict[str, Any]:
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING}


def differing_options(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the dotted names of the options in which two configs, as JSON, differ."""
    found = []
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name), b.get(name)
        if isinstance(x, dict) and isinstance(y, dict):
            found += [f"{name}.{inner}" for inner in differing_options(x, y)]
        elif x != y:
            found.append(name)
    return found


def stage_at(config: TrainConfig, step: int) -> tuple[Literal["joint", "frozen"], StageConfig, int]:
    """Return the stage of the update after `step` finished ones: name, config, and the update's number within it."""
    if step < config.joint.steps:
        return "joint", config.joint, step
    return "frozen", config.frozen, step - config.joint.steps


def total_steps(config: TrainConfig) -> int:
    return config.joint.steps + config.frozen.steps


def rollout_length(stage: StageConfig, step: int) -> int:
    """Return how far update `step` of a stage rolls out."""
    if not stage.rollout_start:
        return stage.rollout
    ramp = max(1, round(stage.rollout_ramp * stage.steps))
    return min(stage.rollout, stage.rollout_start + (stage.rollout - stage.rollout_start) * step // ramp)
