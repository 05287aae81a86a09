"""A vision transformer over tubelets of video, and the narrow predictor of its masked pre-training.

Shape legend: b batch, t frames, h w picture, n tokens of a clip, k kept ones, m hidden ones, e width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.files import read_json, write_bytes, write_json
from worldline.model.transformer import Block, Norm

_FORMAT = "worldline-video-encoder"
CARD, WEIGHTS = "encoder.json", "encoder.safetensors"


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The sizes of a video transformer and of its predictor. The defaults are the `vit_tiny` preset."""

    image_size: int = 64
    """Height and width of the pictures, pixels; at most the clips' own, of which a part is then cut out at random."""
    frames: int = 16
    """Frames of a clip; those of the clips it is trained on."""
    patch: int = 8
    """Pixels along a side of a tubelet."""
    tubelet: int = 2
    """Frames of a tubelet."""
    width: int = 192
    """Channels of the encoder."""
    depth: int = 12
    """Blocks of the encoder."""
    heads: int = 3
    """Attention heads of the encoder."""
    predictor_width: int = 96
    """Channels of the predictor, narrower than the encoder so that it cannot do the encoder's work."""
    predictor_depth: int = 4
    """Blocks of the predictor."""
    predictor_heads: int = 3
    """Attention heads of the predictor."""

    def __post_init__(self) -> None:
        require_at_least(self, dict.fromkeys(asdict(self), 1), "model.")
        if self.image_size % self.patch or self.frames % self.tubelet:
            raise WorldlineError(
                f"model.patch must divide image_size and tubelet must divide frames, got {self.patch} for "
                f"{self.image_size} and {self.tubelet} for {self.frames}"
            )
        for width, heads in ((self.width, self.heads), (self.predictor_width, self.predictor_heads)):
            if width % heads or width % 2:
                raise WorldlineError(f"a transformer's width must be even and a multiple of its heads, got {width}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        side = self.image_size // self.patch
        return self.frames // self.tubelet, side, side

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class VideoEncoder(nn.Module):
    """Map clips to one feature a tubelet: a linear map, fixed sine positions, pre-norm blocks.

    Source: V-JEPA, arXiv 2404.08471, section 3.
    """

    position: Tensor

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.tubelet * config.patch**2 * 3, config.width)
        self.register_buffer("position", sine_positions(config.grid, config.width), persistent=False)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = Norm(config.width)
        _initialise(self)

    def forward(
        self, clips: UInt8[Tensor, "b t h w 3"], kept: Int64[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b _ e"]:
        """Encode the `kept` tokens, or all; only those are computed. Tokens count along width, then height, time."""
        tubelets = _tubelets(clips, self.config)  # (b, n, pixels)
        if kept is not None:
            tubelets = _pick(tubelets, kept)
        return self.encode(tubelets.float() / 127.5 - 1.0, kept)

    def encode(
        self, tubelets: Float[Tensor, "b k p"], kept: Int64[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k e"]:
        """Encode tubelets with values in [-1, 1] that lie at the `kept` places, or at all."""
        position = self.position.expand(len(tubelets), -1, -1)
        x = self.embed(tubelets) + (position if kept is None else _pick(position, kept))
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.norm(x)
        return y


class PictureEncoder(nn.Module):
    """Map pictures in [-1, 1] to latents by a video encoder that sees each as a clip of one tubelet, standing still.

    Features keep their places: few channels of each, flattened, as the conv encoder does.
    Source: V-JEPA 2-AC, arXiv 2506.09985, encodes each frame of a robot's video in this way.
    """

    def __init__(self, config: VideoConfig, latent_dim: int, channels: int) -> None:
        super().__init__()
        self.video = VideoEncoder(config)
        self.narrow = nn.Linear(config.width, channels)
        _, rows, cols = config.grid
        self.linear = nn.Linear(channels * rows * cols, latent_dim)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        config = self.video.config
        still = x.permute(0, 2, 3, 1)[:, None].expand(-1, config.tubelet, -1, -1, -1)
        z: Tensor = self.linear(self.narrow(self.video.encode(_tubelets(still, config))).flatten(1))
        return z


class MaskedVideo(nn.Module):
    """An encoder of the tokens that are kept, and a predictor that tells the features of the hidden ones from them.

    Source: V-JEPA, arXiv 2404.08471, section 3.2.
    """

    position: Tensor

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VideoEncoder(config)
        width = config.predictor_width
        self.narrow = nn.Linear(config.width, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("position", sine_positions(config.grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, config.predictor_heads) for _ in range(config.predictor_depth))
        self.norm = Norm(width)
        self.widen = nn.Linear(width, config.width)
        for module in (self.narrow, self.blocks, self.widen):
            _initialise(module)
        nn.init.normal_(self.hidden_token, std=0.02)

    def forward(
        self,
        clips: UInt8[Tensor, "b t h w 3"],
        kept: Int64[Tensor, "b k"],
        hidden: Int64[Tensor, "b m"],
        whole: bool = False,
    ) -> tuple[Float[Tensor, "b m e"], Float[Tensor, "b n e"] | None]:
        """Return the features told of the hidden tokens and, with `whole`, the encoder's of all of them."""
        context = self.narrow(self.encoder(clips, kept))
        position = self.position.expand(len(clips), -1, -1)
        x = torch.cat((context + _pick(position, kept), self.hidden_token + _pick(position, hidden)), dim=1)
        for block in self.blocks:
            x = block(x)
        told = self.widen(self.norm(x[:, kept.shape[1] :]))
        return told.clone(), self.encoder(clips) if whole else None  # not a view: FSDP hooks on to what comes out


def sine_positions(grid: tuple[int, int, int], width: int) -> Float[Tensor, "1 n e"]:
    """Return sines and cosines of time, row and column: a quarter, three eighths and three eighths of the channels."""
    quarter = max(2, width // 4 // 2 * 2)
    rows = (width - quarter) // 4 * 2
    shares = (quarter, rows, width - quarter - rows)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    parts = []
    for axis, share in zip(axes, shares, strict=True):
        half = (share + 1) // 2
        frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / max(1, half))
        angle = axis.reshape(-1, 1) * frequency
        parts.append(torch.cat((angle.sin(), angle.cos()), dim=1)[:, :share])
    return torch.cat(parts, dim=1)[None]


def save_encoder(directory: str | Path, config: VideoConfig, weights: Mapping[str, Any], training: Any) -> None:
    """Write an encoder's weights and card into a directory, each file whole or absent, the card last."""
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    write_bytes(Path(directory) / WEIGHTS, save(plain))
    card = {"format": _FORMAT, "config": config.to_json(), "training": training}
    write_json(Path(directory) / CARD, card)


def load_encoder(directory: str | Path) -> VideoEncoder:
    """Read the encoder of a finished pre-training, ready to look at clips.

    Raises:
        WorldlineError: there is none, or it is damaged.
    """
    card = read_json(Path(directory) / CARD)
    if not isinstance(card, dict) or card.get("format") != _FORMAT:
        raise WorldlineError(f"{directory} holds no pre-trained encoder; give the folder of a worldline pretrain run")
    encoder = VideoEncoder(VideoConfig(**card["config"]))
    try:
        encoder.load_state_dict(load_file(Path(directory) / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WorldlineError(f"{Path(directory) / WEIGHTS} is damaged: {reason}") from None
    return encoder.eval()


def _tubelets(clips: Tensor, config: VideoConfig) -> Tensor:
    """Cut clips into tubelets, each as one row."""
    wanted = (config.frames, config.image_size, config.image_size, 3)
    if tuple(clips.shape[1:]) != wanted:
        raise WorldlineError(f"this encoder sees clips of shape {wanted}, got {tuple(clips.shape[1:])}; cut them first")
    (t, h, w), p = config.grid, config.patch
    cut = clips.reshape(len(clips), t, config.tubelet, h, p, w, p, 3)
    return cut.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(clips), t * h * w, -1)


def _pick(x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def _initialise(module: nn.Module) -> None:
    """Small normal weights, no biases; maps back into the residual stream smaller the deeper they lie."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
    for depth, block in enumerate(part for part in module.modules() if isinstance(part, Block)):
        for linear in (block.attention.out, block.mlp[2]):
            assert isinstance(linear, nn.Linear)
            linear.weight.data.div_((2.0 * (depth + 1)) ** 0.5)
