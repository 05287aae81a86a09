"""LeWM checkpoints as stable-worldmodel 0.1 saves them, read and run without that package.

A checkpoint is a state dict (`weights.pt`) beside `config.json`. Sizes are read off the tensors, the numbers of
attention heads off the configuration; nothing in it is instantiated by name. Networks: a ViT whose class token is
projected to the latent, and a causal transformer over `history` latents, each block conditioned on an embedding of the
`frame_skip` actions that follow its latent.

Source: arXiv 2603.19312; names of tensors: stable-worldmodel 0.1.1 with transformers 4 or 5.

Shape legend: b batch, n tokens, k history, e width, d latent, a the actions of one step.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json

CONFIG = "config.json"
_WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")
_VIT_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
_NOT_READ = ("num_batches_tracked", "mask_token", "pooler.dense.weight", "pooler.dense.bias")
_RENAMED = (  # transformers 5 -> 4, of the ViT's blocks; in this order
    ("encoder.layers.", "encoder.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class LeWMState(NamedTuple):
    z: Float[Tensor, "b d"]
    past: Float[Tensor, "b km1 d"]
    """The latents before `z`, oldest first."""
    actions: Float[Tensor, "b km1 a"]
    """What was done after each of them."""


class LeWM:
    """LeWM for inference, float32. `actions` are of the environment that it is run on: they say how to normalise.

    A checkpoint holds no action statistics; its training took them from the whole of its data, mean and deviation of
    each action. Pictures of any size are resized (bilinear, antialiased), as its training did.

    Raises:
        WorldlineError: the tensors are not those of a LeWM, or its actions are not a multiple of the environment's.
    """

    image_size = None

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        vit_heads: int,
        heads: int,
        actions: Float32[np.ndarray, "n a"],
        source: str = "LeWM",
    ) -> None:
        self.source = source
        self._weights = {name: tensor.float() for name, tensor in weights.items() if tensor.is_floating_point()}
        self._read: set[str] = set()
        self._vit_heads, self._heads = vit_heads, heads
        self.context = self._tensor("predictor.pos_embedding").shape[1]
        self._patch = self._tensor("encoder.embeddings.patch_embeddings.projection.weight").shape[-1]
        self._image_size = self._patch * math.isqrt(self._tensor("encoder.embeddings.position_embeddings").shape[1] - 1)
        wanted, given = self._tensor("action_encoder.patch_embed.weight").shape[1], actions.shape[1]
        if wanted % given:
            raise WorldlineError(
                f"{source}: one step takes {wanted} action values, expected a multiple of the {given} that one step of "
                "the dataset has; evaluate it on data of the environment that it was trained in"
            )
        self.frame_skip = wanted // given
        std = torch.from_numpy(actions).double().std(dim=0)
        self._action_mean = torch.from_numpy(actions).double().mean(dim=0).float().repeat(self.frame_skip)
        self._action_std = torch.where(std > 1e-6, std, 1.0).float().repeat(self.frame_skip)
        self._check()

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for name, tensor in self._weights.items() if "running_" not in name)

    def encode(self, frames: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        mean, std = (torch.tensor(each)[:, None, None] for each in _IMAGENET)
        x = (frames.permute(0, 3, 1, 2).float() / 255.0 - mean) / std
        size = (self._image_size, self._image_size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        patches = F.conv2d(
            x,
            self._tensor("encoder.embeddings.patch_embeddings.projection.weight"),
            self._tensor("encoder.embeddings.patch_embeddings.projection.bias"),
            stride=self._patch,
        )
        x = torch.cat(
            (self._tensor("encoder.embeddings.cls_token").expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)),
            dim=1,
        )  # (b, n, e)
        x = x + self._tensor("encoder.embeddings.position_embeddings")
        for layer in self._layers("encoder.encoder.layer."):
            normed = self._norm(f"{layer}.layernorm_before", x, 1e-12)
            qkv = [self._linear(f"{layer}.attention.attention.{part}", normed) for part in ("query", "key", "value")]
            x = x + self._linear(f"{layer}.attention.output.dense", _attend(qkv, self._vit_heads, causal=False))
            normed = self._norm(f"{layer}.layernorm_after", x, 1e-12)
            x = x + self._linear(f"{layer}.output.dense", F.gelu(self._linear(f"{layer}.intermediate.dense", normed)))
        return self._project("projector", self._norm("encoder.layernorm", x[:, 0], 1e-12))

    def begin(self, z: Float[Tensor, "b k d"], actions: Float[Tensor, "b km1 a"]) -> LeWMState:
        return LeWMState(z[:, -1], z[:, :-1], actions)

    def step(self, state: LeWMState, action: Float[Tensor, "b a"]) -> LeWMState:
        z = torch.cat((state.past, state.z[:, None]), dim=1)  # (b, k, d)
        actions = torch.cat((state.actions, action[:, None]), dim=1)
        return LeWMState(self.teacher_forced(z, actions)[:, -1], z[:, 1:], actions[:, 1:])

    def teacher_forced(self, z: Float[Tensor, "b k d"], actions: Float[Tensor, "b k a"]) -> Float[Tensor, "b k d"]:
        """Predict each latent's successor from those up to it; at most `context` latents."""
        x = z + self._tensor("predictor.pos_embedding")[:, : z.shape[1]]
        condition = self._embed_actions(actions)
        stem = "predictor.transformer"
        if f"{stem}.input_proj.weight" in self._weights:
            x = self._linear(f"{stem}.input_proj", x)
            condition = self._linear(f"{stem}.cond_proj", condition)
        for layer in self._layers(f"{stem}.layers."):
            parts = self._linear(f"{layer}.adaLN_modulation.1", F.silu(condition)).chunk(6, dim=-1)
            shift, scale, gate = parts[:3]
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
            qkv = self._linear(f"{layer}.attn.to_qkv", self._norm(f"{layer}.attn.norm", normed, 1e-5)).chunk(3, dim=-1)
            attended = _attend(list(qkv), self._heads, causal=True)
            if f"{layer}.attn.to_out.0.weight" in self._weights:
                attended = self._linear(f"{layer}.attn.to_out.0", attended)
            x = x + gate * attended
            shift, scale, gate = parts[3:]
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
            normed = self._norm(f"{layer}.mlp.net.0", normed, 1e-5)
            x = x + gate * self._linear(f"{layer}.mlp.net.4", F.gelu(self._linear(f"{layer}.mlp.net.1", normed)))
        x = self._norm(f"{stem}.norm", x, 1e-5)
        if f"{stem}.output_proj.weight" in self._weights:
            x = self._linear(f"{stem}.output_proj", x)
        return self._project("pred_proj", x)

    def _embed_actions(self, actions: Float[Tensor, "b k a"]) -> Float[Tensor, "b k d"]:
        x = (actions - self._action_mean) / self._action_std
        x = F.linear(
            x,
            self._tensor("action_encoder.patch_embed.weight")[:, :, 0],  # a convolution over single steps
            self._tensor("action_encoder.patch_embed.bias"),
        )
        return self._linear("action_encoder.embed.2", F.silu(self._linear("action_encoder.embed.0", x)))

    def _project(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.net.0.weight" not in self._weights:
            return x
        x = self._linear(f"{name}.net.0", x)
        if f"{name}.net.1.running_mean" in self._weights:  # a batch norm at rest
            mean, variance = (self._tensor(f"{name}.net.1.running_{kind}") for kind in ("mean", "var"))
            x = (x - mean) * (variance + 1e-5).rsqrt()
            x = x * self._tensor(f"{name}.net.1.weight") + self._tensor(f"{name}.net.1.bias")
        elif f"{name}.net.1.weight" in self._weights:
            x = self._norm(f"{name}.net.1", x, 1e-5)
        return self._linear(f"{name}.net.3", F.gelu(x))

    def _tensor(self, name: str) -> Tensor:
        self._read.add(name)
        if name not in self._weights:
            raise WorldlineError(
                f"{self.source}: not a LeWM checkpoint of stable-worldmodel 0.1: expected a tensor {name}, got "
                f"{len(self._weights)} tensors without it; save the whole model's state_dict()"
            )
        return self._weights[name]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = f"{name}.bias"
        return F.linear(x, self._tensor(f"{name}.weight"), self._tensor(bias) if bias in self._weights else None)

    def _norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"), eps)

    def _layers(self, stem: str) -> list[str]:
        numbers = {int(name[len(stem) :].split(".")[0]) for name in self._weights if name.startswith(stem)}
        return [f"{stem}{number}" for number in sorted(numbers)]

    @torch.inference_mode()
    def _check(self) -> None:
        """Run it once: every tensor must fit, and none may be left over, which would mean another network."""
        try:
            z = self.encode(torch.zeros(1, self._image_size, self._image_size, 3, dtype=torch.uint8))
            self.teacher_forced(
                z[:, None].expand(-1, self.context, -1), torch.zeros(1, self.context, len(self._action_mean))
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise WorldlineError(
                f"{self.source}: its tensors do not fit each other, or not {self._vit_heads} and {self._heads} heads "
                f"in encoder and predictor ({reason}); keep the weights and {CONFIG} of one run together"
            ) from None
        if left := sorted(name for name in self._weights.keys() - self._read if not name.endswith(_NOT_READ)):
            raise WorldlineError(
                f"{self.source}: expected the tensors of a LeWM, got {len(left)} more ({', '.join(left[:3])}); this is "
                "another network: bring it through a Python entry point, module:callable"
            )


def read_lewm(path: Path, *, actions: Float32[np.ndarray, "n a"], allow_pickled_code: bool) -> tuple[LeWM, str]:
    """Read a checkpoint, a file or the folder around it, and return it with the SHA-256 of its weights' file.

    Raises:
        WorldlineError: no such checkpoint, another network, or a pickle of objects without `allow_pickled_code`.
    """
    file = _weights_file(path)
    content = _load(file, allow_pickled_code)
    if isinstance(content, nn.Module):
        vit_heads, heads = _heads_of_module(content, file)
        weights: Any = content.state_dict()
    else:
        vit_heads, heads = _heads_of_config(file.parent / CONFIG)
        weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise WorldlineError(f"{file}: expected a state dict, names to tensors, got {type(content).__name__}")
    if all(name.startswith("model.") for name in weights):  # the trainer's wrapping
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    lewm = LeWM(
        {_old_name(name): tensor for name, tensor in weights.items()},
        vit_heads=vit_heads,
        heads=heads,
        actions=actions,
        source=str(file),
    )
    return lewm, hashlib.sha256(file.read_bytes()).hexdigest()


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix not in _WEIGHTS:
            raise WorldlineError(f"{path}: expected weights of a LeWM, a file that ends in {', '.join(_WEIGHTS)}")
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHTS)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise WorldlineError(f"{path}: expected one file of weights beside {CONFIG}, got {found}; name the one to take")
    return files[0]


def _load(file: Path, allow_pickled_code: bool) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(file):  # no checkpoint at all: its owner must not be led to the flag
            raise _unreadable(file, "not an archive that torch.save writes") from None
        if not allow_pickled_code:
            raise WorldlineError(
                f"{file}: expected tensors only, got a pickle of Python objects, and loading one runs whatever code "
                f"its author put into it; save model.state_dict() beside {CONFIG} instead, or, if you trust where the "
                "file comes from, give allow_pickled_code=true"
            ) from None
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise _unreadable(file, str(error).partition("\n")[0] or type(error).__name__) from None
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (ModuleNotFoundError, AttributeError) as error:
        raise WorldlineError(
            f"{file}: its objects need the code that made them ({error}); pip install stable-worldmodel transformers, "
            f"or save model.state_dict() beside {CONFIG}"
        ) from None


def _unreadable(file: Path, reason: str) -> WorldlineError:
    return WorldlineError(f"{file}: cannot be read ({reason}); copy it again")


def _heads_of_config(path: Path) -> tuple[int, int]:
    if not path.exists():
        raise WorldlineError(
            f"{path} is missing: it says how many attention heads a LeWM has; copy it beside the weights"
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise WorldlineError(f"{path}: expected an object, got {type(config).__name__}")
    target = str(config.get("_target_", ""))
    if target and not target.endswith(".LeWM"):
        raise WorldlineError(
            f"{path} describes {target}, expected stable_worldmodel.wm.lewm.LeWM; bring another network through a "
            "Python entry point, module:callable"
        )
    # the model's own configuration, or the whole of its training's
    encoder = config.get("encoder", {"size": config.get("encoder_scale")})
    predictor = config.get("predictor", {})
    if not isinstance(encoder, dict) or not isinstance(predictor, dict):
        raise WorldlineError(f"{path}: expected objects as encoder and predictor, got {encoder!r} and {predictor!r}")
    vit_heads = encoder.get("num_attention_heads") or _VIT_HEADS.get(str(encoder.get("size")))
    heads = predictor.get("heads")
    if not isinstance(vit_heads, int) or not isinstance(heads, int):
        raise WorldlineError(
            f"{path}: expected encoder.size (one of {', '.join(_VIT_HEADS)}) and predictor.heads, got "
            f"{encoder.get('size')!r} and {heads!r}"
        )
    return vit_heads, heads


def _heads_of_module(model: nn.Module, file: Path) -> tuple[int, int]:
    try:
        encoder: Any = model.get_submodule("encoder")
        attention: Any = model.get_submodule("predictor.transformer.layers.0.attn")
        return int(encoder.config.num_attention_heads), int(attention.heads)
    except AttributeError as error:
        raise WorldlineError(f"{file}: expected a LeWM object, got {type(model).__name__} ({error})") from None


def _old_name(name: str) -> str:
    if name.startswith("encoder.layers."):
        for new, old in _RENAMED:
            name = name.replace(new, old)
    return name


def _attend(qkv: list[Tensor], heads: int, *, causal: bool) -> Tensor:
    q, k, v = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in qkv)  # (b, heads, n, e / heads)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
