"""LeWM checkpoints: against a plain rendering in NumPy, written from the paper, and refused where they are not one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldline.core.errors import WorldlineError
from worldline.core.types import WorldSpec
from worldline.evaluate.windows import imagine
from worldline.model.foreign import load_any
from worldline.model.lewm import LeWM, read_lewm

WIDTH, LATENT, HISTORY, SKIP, ACTION = 12, 8, 3, 5, 2
VIT_HEADS, HEADS, HEAD_WIDTH = 3, 4, 5
RNG = np.random.default_rng(0)
ACTIONS = RNG.uniform(-3, 9, size=(300, ACTION)).astype(np.float32)


def tensors() -> dict[str, torch.Tensor]:
    """Return random weights of a small LeWM under the names of stable-worldmodel 0.1.1 with transformers 4."""
    rng = np.random.default_rng(1)
    made: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, scale: float = 0.3, shift: float = 0.0) -> None:
        made[name] = torch.from_numpy((rng.normal(size=shape) * scale + shift).astype(np.float32))

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        add(f"{name}.weight", outputs, inputs)
        if bias:
            add(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, shift=1.0)
        add(f"{name}.bias", width)

    stem = "encoder.embeddings"
    add(f"{stem}.cls_token", 1, 1, WIDTH)
    add(f"{stem}.position_embeddings", 1, 5, WIDTH)
    add(f"{stem}.patch_embeddings.projection.weight", WIDTH, 3, 14, 14, scale=0.03)
    add(f"{stem}.patch_embeddings.projection.bias", WIDTH)
    for i in range(2):
        layer = f"encoder.encoder.layer.{i}"
        norm(f"{layer}.layernorm_before", WIDTH)
        norm(f"{layer}.layernorm_after", WIDTH)
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            linear(f"{layer}.attention.{part}", WIDTH, WIDTH)
        linear(f"{layer}.intermediate.dense", WIDTH, 4 * WIDTH)
        linear(f"{layer}.output.dense", 4 * WIDTH, WIDTH)
    norm("encoder.layernorm", WIDTH)
    for name in ("projector", "pred_proj"):
        linear(f"{name}.net.0", WIDTH, 20)
        norm(f"{name}.net.1", 20)
        add(f"{name}.net.1.running_mean", 20)
        made[f"{name}.net.1.running_var"] = torch.from_numpy(rng.uniform(0.5, 2.0, 20).astype(np.float32))
        made[f"{name}.net.1.num_batches_tracked"] = torch.tensor(7)
        linear(f"{name}.net.3", 20, LATENT)
    add("predictor.pos_embedding", 1, HISTORY, LATENT)
    stem = "predictor.transformer"
    norm(f"{stem}.norm", WIDTH)
    linear(f"{stem}.input_proj", LATENT, WIDTH)
    linear(f"{stem}.cond_proj", LATENT, WIDTH)
    for i in range(2):
        layer = f"{stem}.layers.{i}"
        norm(f"{layer}.attn.norm", WIDTH)
        linear(f"{layer}.attn.to_qkv", WIDTH, 3 * HEADS * HEAD_WIDTH, bias=False)
        linear(f"{layer}.attn.to_out.0", HEADS * HEAD_WIDTH, WIDTH)
        norm(f"{layer}.mlp.net.0", WIDTH)
        linear(f"{layer}.mlp.net.1", WIDTH, 24)
        linear(f"{layer}.mlp.net.4", 24, WIDTH)
        linear(f"{layer}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
    add("action_encoder.patch_embed.weight", 10, SKIP * ACTION, 1)
    add("action_encoder.patch_embed.bias", 10)
    linear("action_encoder.embed.0", 10, 4 * LATENT)
    linear("action_encoder.embed.2", 4 * LATENT, LATENT)
    return made


CONFIG: dict[str, Any] = {
    "_target_": "stable_worldmodel.wm.lewm.LeWM",
    "encoder": {"_target_": "stable_pretraining.backbone.utils.vit_hf", "size": "tiny", "patch_size": 14},
    "predictor": {"_target_": "stable_worldmodel.wm.lewm.module.Predictor", "heads": HEADS, "dim_head": HEAD_WIDTH},
}


def save(folder: Path, weights: Any, config: dict[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "weights.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(path: Path, allow: bool = False) -> LeWM:
    return read_lewm(path, actions=ACTIONS, allow_pickled_code=allow)[0]


class Plain:
    """LeWM in float64 NumPy, one token and one head at a time."""

    def __init__(self) -> None:
        self.w = {name: tensor.numpy().astype(np.float64) for name, tensor in tensors().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.w[f"{name}.weight"] @ x + self.w.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: np.ndarray, eps: float) -> np.ndarray:
        return standardised(x, eps) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def project(self, name: str, x: np.ndarray) -> np.ndarray:
        x = self.linear(f"{name}.net.0", x)
        bn = {part: self.w[f"{name}.net.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")}
        x = (x - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-5) * bn["weight"] + bn["bias"]
        return self.linear(f"{name}.net.3", gelu(x))

    def encode(self, frame: np.ndarray) -> np.ndarray:
        picture = (frame / 255.0 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        kernel = self.w["encoder.embeddings.patch_embeddings.projection.weight"]
        tokens = [self.w["encoder.embeddings.cls_token"][0, 0]]
        for row in (0, 14):
            for column in (0, 14):
                patch = picture[row : row + 14, column : column + 14]
                token = np.einsum("ecij,ijc->e", kernel, patch)
                tokens.append(token + self.w["encoder.embeddings.patch_embeddings.projection.bias"])
        tokens = [t + p for t, p in zip(tokens, self.w["encoder.embeddings.position_embeddings"][0], strict=True)]
        for i in range(2):
            layer = f"encoder.encoder.layer.{i}"
            normed = [self.norm(f"{layer}.layernorm_before", t, 1e-12) for t in tokens]
            q, k, v = (
                [self.linear(f"{layer}.attention.attention.{part}", t) for t in normed]
                for part in ("query", "key", "value")
            )
            for n in range(len(tokens)):
                mixed = attend(q[n], k, v, VIT_HEADS)
                tokens[n] = tokens[n] + self.linear(f"{layer}.attention.output.dense", mixed)
            for n, token in enumerate(tokens):
                inner = self.linear(f"{layer}.intermediate.dense", self.norm(f"{layer}.layernorm_after", token, 1e-12))
                tokens[n] = token + self.linear(f"{layer}.output.dense", gelu(inner))
        return self.project("projector", self.norm("encoder.layernorm", tokens[0], 1e-12))

    def predict(self, z: list[np.ndarray], actions: list[np.ndarray]) -> list[np.ndarray]:
        """Predict each successor of at most three latents; `actions[i]` are the (5, 2) native actions after it."""
        mean, std = ACTIONS.astype(np.float64).mean(axis=0), ACTIONS.astype(np.float64).std(axis=0, ddof=1)
        conditions = []
        for action in actions:
            smooth = self.w["action_encoder.patch_embed.weight"][:, :, 0] @ ((action - mean) / std).reshape(-1)
            smooth = smooth + self.w["action_encoder.patch_embed.bias"]
            embedded = self.linear("action_encoder.embed.2", silu(self.linear("action_encoder.embed.0", smooth)))
            conditions.append(silu(self.linear("predictor.transformer.cond_proj", embedded)))
        positions = self.w["predictor.pos_embedding"][0]
        tokens = [self.linear("predictor.transformer.input_proj", t + positions[n]) for n, t in enumerate(z)]
        for i in range(2):
            layer = f"predictor.transformer.layers.{i}"
            parts = [np.split(self.linear(f"{layer}.adaLN_modulation.1", c), 6) for c in conditions]
            normed = [
                self.norm(f"{layer}.attn.norm", standardised(t, 1e-6) * (1 + p[1]) + p[0], 1e-5)
                for t, p in zip(tokens, parts, strict=True)
            ]
            q, k, v = zip(*(np.split(self.linear(f"{layer}.attn.to_qkv", t), 3) for t in normed), strict=True)
            for n, p in enumerate(parts):
                mixed = attend(q[n], list(k[: n + 1]), list(v[: n + 1]), HEADS)
                tokens[n] = tokens[n] + p[2] * self.linear(f"{layer}.attn.to_out.0", mixed)
            for n, p in enumerate(parts):
                x = self.norm(f"{layer}.mlp.net.0", standardised(tokens[n], 1e-6) * (1 + p[4]) + p[3], 1e-5)
                x = self.linear(f"{layer}.mlp.net.4", gelu(self.linear(f"{layer}.mlp.net.1", x)))
                tokens[n] = tokens[n] + p[5] * x
        return [self.project("pred_proj", self.norm("predictor.transformer.norm", t, 1e-5)) for t in tokens]


def standardised(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + eps)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def attend(q: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], heads: int) -> np.ndarray:
    width = len(q) // heads
    out = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp([q[part] @ key[part] / math.sqrt(width) for key in keys])
        out.append(sum(s * value[part] for s, value in zip(scores / scores.sum(), values, strict=True)))
    return np.concatenate(out)


def test_latents_agree_with_the_plain_rendering(tmp_path: Path) -> None:
    model, plain = read(save(tmp_path / "run", tensors())), Plain()
    assert (model.context, model.frame_skip) == (HISTORY, SKIP)
    frames = RNG.integers(0, 256, size=(3, 28, 28, 3), dtype=np.uint8)
    z = model.encode(torch.from_numpy(frames))
    expected = np.stack([plain.encode(frame) for frame in frames])
    np.testing.assert_allclose(z.numpy(), expected, atol=2e-5)
    assert expected.std(axis=0).min() > 1e-3, "different pictures must differ, else nothing was tested"

    actions = RNG.choice(ACTIONS, size=(7, SKIP))  # (steps, k, a)
    flat = torch.from_numpy(actions).reshape(1, 7, SKIP * ACTION)
    forced = model.teacher_forced(z[None], flat[:, :HISTORY])
    np.testing.assert_allclose(forced[0].numpy(), plain.predict(list(expected), list(actions[:3])), atol=2e-5)

    state = model.begin(z[None], flat[:, : HISTORY - 1])
    rolled = list(expected)
    for step in range(5):
        state = model.step(state, flat[:, HISTORY - 1 + step])
        rolled.append(plain.predict(rolled[-3:], list(actions[step : step + 3]))[-1])
        np.testing.assert_allclose(state.z[0].numpy(), rolled[-1], atol=1e-4)
    other = model.step(state, flat[:, 0]).z - model.step(state, flat[:, 1]).z
    assert other.abs().max() > 1e-3, "actions must matter, else nothing was tested"


def test_both_names_both_configs_and_a_trainers_wrapping_are_read(tmp_path: Path) -> None:
    frames = torch.from_numpy(RNG.integers(0, 256, size=(2, 28, 28, 3), dtype=np.uint8))
    z = read(save(tmp_path / "a", tensors())).encode(frames)
    renamed = {}
    for name, tensor in tensors().items():
        for old, new in (
            ("encoder.encoder.layer.", "encoder.layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor
    training = {"encoder_scale": "tiny", "predictor": {"heads": HEADS}, "wm": {"history_size": 3}}
    assert torch.equal(read(save(tmp_path / "b", renamed, training)).encode(frames), z)
    wrapped = {"state_dict": {f"model.{name}": tensor for name, tensor in tensors().items()}}
    assert torch.equal(read(save(tmp_path / "c", wrapped) / "weights.pt").encode(frames), z)


def test_pictures_of_another_size_are_resized(tmp_path: Path) -> None:
    model = read(save(tmp_path / "run", tensors()))
    grey = torch.full((1, 64, 64, 3), 90, dtype=torch.uint8)
    assert torch.allclose(model.encode(grey), model.encode(grey[:, :28, :28]), atol=1e-5)


class Harmless(torch.nn.Module):
    """An object, not tensors."""


def test_a_pickle_of_objects_is_refused_without_the_flag(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", Harmless())
    with pytest.raises(WorldlineError, match=r"runs whatever code its author put into it.*allow_pickled_code=true"):
        read(folder)
    with pytest.raises(WorldlineError, match="expected a LeWM object, got Harmless"):
        read(folder, allow=True)


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors().items() if key != name}


@pytest.mark.parametrize(
    ("weights", "config", "told"),
    [
        (without("encoder.layernorm.bias"), CONFIG, r"expected a tensor encoder\.layernorm\.bias"),
        (tensors() | {"reward_head.weight": torch.zeros(2, 2)}, CONFIG, r"1 more \(reward_head\.weight\)"),
        (tensors(), CONFIG | {"predictor": {"heads": 7}}, "or not 3 and 7 heads"),
        (tensors(), CONFIG | {"_target_": "stable_worldmodel.wm.pldm.PLDM"}, r"describes stable_worldmodel\.wm\.pldm"),
        (tensors(), {"encoder": {"size": "giant"}}, "expected encoder.size .* got 'giant' and None"),
        (tensors(), {"encoder": "vit"}, "expected objects as encoder and predictor, got 'vit' and {}"),
        (tensors(), None, r"config\.json is missing"),
        ([1, 2], CONFIG, "expected a state dict, names to tensors, got list"),
    ],
)
def test_what_is_no_lewm_is_refused(tmp_path: Path, weights: Any, config: dict | None, told: str) -> None:
    with pytest.raises(WorldlineError, match=told):
        read(save(tmp_path / "run", weights, config))


def test_other_actions_and_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", tensors())
    with pytest.raises(WorldlineError, match="takes 10 action values, expected a multiple of the 3"):
        read_lewm(folder, actions=np.zeros((5, 3), np.float32), allow_pickled_code=False)
    file = folder / "weights.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(WorldlineError, match=r"cannot be read .*copy it again"):
        read(folder)
    for allow in (False, True):  # whoever names a file that is no checkpoint is not led to the flag
        file.write_bytes(bytes(range(256)) * 9)
        with pytest.raises(WorldlineError, match=r"cannot be read .*copy it again"):
            read(folder, allow)
        (folder / "model.py").write_text("import os\n")
        with pytest.raises(WorldlineError, match=r"expected weights of a LeWM, a file that ends in \.pt"):
            read(folder / "model.py", allow)
    (folder / "model.py").unlink()
    file.rename(folder / "a.pt")
    (folder / "b.pt").touch()
    with pytest.raises(WorldlineError, match=r"got a\.pt, b\.pt; name the one to take"):
        read(folder)


def test_evaluation_feeds_it_every_fifth_latent_and_five_actions_at_once(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", tensors())
    spec = WorldSpec(
        name="any",
        image_size=28,
        step_seconds=0.1,
        action_names=("x", "y"),
        action_low=(0.0, 0.0),
        action_high=(1.0, 1.0),
    )
    world, plain = load_any(str(folder), spec, actions=ACTIONS), Plain()
    assert world.config.latent_dim == LATENT
    context = RNG.normal(size=(2, 14, LATENT)).astype(np.float32)  # 3 more frames than it wants
    past, actions = RNG.choice(ACTIONS, size=(2, 13)), RNG.choice(ACTIONS, size=(2, 12))
    imagined = imagine(world, context, past, actions)
    assert imagined.shape == (2, 13, LATENT)
    for window in range(2):
        z = list(context[window, [3, 8, 13]].astype(np.float64))
        done = np.concatenate([past[window, 3:], actions[window, :10]]).reshape(4, SKIP, ACTION)
        first = plain.predict(z, list(done[:3]))[-1]
        second = plain.predict([*z[1:], first], list(done[1:]))[-1]
        np.testing.assert_allclose(imagined[window, [0, 5, 10]], [z[-1], first, second], atol=1e-4)
        assert np.array_equal(imagined[window, 7], imagined[window, 5]), "in between the last one is held"
