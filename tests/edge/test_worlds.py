"""A whole world in integers: near the float one, and the same bytes from Python, this machine, every board and play."""

from __future__ import annotations

import shutil
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from little_world import CONTEXT, SIZES, STEPS, pictures

from worldline.core.errors import WorldlineError
from worldline.edge import build, commands, images
from worldline.edge.build import BOARDS
from worldline.edge.commands import Command
from worldline.edge.emit import write_table
from worldline.edge.planner import Budget, plan
from worldline.edge.program import write_world
from worldline.edge.sensitivity import sensitivity
from worldline.edge.world import State
from worldline.engine.recording import Kind
from worldline.engine.runtime import _EVENT, Engine, _genesis
from worldline.engine.workloads import open_workload
from worldline.model.checkpoint import load_world
from worldline.model.int8 import PROGRAM, Int8World

ON_BOARDS = [pytest.param(name, marks=pytest.mark.cortex) for name in ("m4", "m7", "m33", "m55")]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ (apt-get install g++)")


def test_integers_follow_the_float_world(worlds):
    world, whole = worlds
    rng = np.random.default_rng(1)
    frames = pictures(rng, 64)
    z = whole.encode(frames)
    with torch.inference_mode():
        real = world.encode(torch.from_numpy(frames)).numpy()
    cosine = (z * real).sum(1) / np.linalg.norm(z.astype(float), axis=1) / np.linalg.norm(real, axis=1)
    assert cosine.mean() > 0.995
    assert cosine.min() > 0.98
    native = rng.uniform(0, 512, (16, STEPS, 2)).astype(np.float32)
    state, ours = whole.begin(z[:16, None], np.zeros((16, 0, 2), np.int16)), []
    for action in whole.actions.run(native).transpose(1, 0, 2):
        state = whole.step(state, action)
        ours.append(state.z * whole.scale)
    with torch.inference_mode():
        begun = world.begin(torch.from_numpy(z[:16, None] * np.float32(whole.scale)), torch.zeros(16, 0, 2))
        theirs = world.rollout(begun, torch.from_numpy(native)).numpy()
        drawn = world.decode(torch.from_numpy(theirs[:, -1])).numpy().astype(int)
    moved = np.square(theirs - theirs[:, :1]).mean()
    lost = np.square(np.stack(ours, axis=1) - theirs).mean() / moved
    assert lost < (0.01 if whole.predictor.input_gates.bits == 8 else 0.05)
    assert np.abs(whole.decode(state.z).astype(int) - drawn).mean() < 3


def test_layer_costs_find_a_spoilt_layer(worlds):
    world, whole = worlds
    rng = np.random.default_rng(9)
    frames = torch.from_numpy(pictures(rng, 16))
    with torch.inference_mode():
        context = world.encode(frames[: 2 * CONTEXT]).reshape(2, CONTEXT, -1).clone()
    actions = torch.from_numpy(rng.uniform(0, 512, (2, CONTEXT + 9, 2)).astype(np.float32))
    rows = sensitivity(world, whole, frames, context, actions)
    count = Counter(row["part"] for row in rows)
    assert count == {
        "encoder": len(whole.encoder.stages) + 1,
        "predictor": 5,
        "decoder": len(whole.decoder.stages) + 1,
    }
    assert max(row["off"] for row in rows if row["part"] == "encoder") < 0.01
    assert max(row["off"] for row in rows if row["part"] == "decoder") < 3
    stages = list(whole.encoder.stages)
    conv = stages[2].conv
    stages[2] = replace(stages[2], conv=replace(conv, weight=conv.weight[:, :, :, ::-1].copy()))
    spoilt = replace(whole, encoder=replace(whole.encoder, stages=tuple(stages)))
    worse = sensitivity(world, spoilt, frames, context, actions)
    assert worse[2]["off"] > 5 * rows[2]["off"]
    assert [row for i, row in enumerate(worse) if i != 2] == [row for i, row in enumerate(rows) if i != 2]


@needs_compiler
@pytest.mark.parametrize("board", ["host", *ON_BOARDS])
def test_every_build_answers_with_the_references_bytes(worlds, tmp_path, board):
    _, whole = worlds
    target = None if board == "host" else BOARDS[board]
    rng = np.random.default_rng(2)
    program, arena = write_world(whole)
    asked, wanted = [], []

    def ask(verb, values=None, want=None):
        asked.append(Command(verb, values))
        wanted.append(want)

    frames = pictures(rng, 3)
    z = whole.encode(frames)
    for frame, latent in zip(frames, z, strict=True):
        ask("picture", frame, latent)
    ask("begin", z[0])
    state = State(z[:1], np.zeros((1, whole.hidden), np.int16))
    for t in range(6):
        action = rng.integers(-(2**15), 2**15, (1, 2)).astype(np.int16)  # far beyond what actions are
        state = whole.step(state, action)
        ask("step", action[0], state.z[0])
        ask("region", None, whole.gauge.region(state.z))
        ask("drift", z[1], whole.gauge.drift(state.z, z[1:2]))
        if t == 2:
            ask("observe", z[2])
            state = State(z[2:3], state.h)
        ask("decode", None, whole.decode(state.z)[0])
    budget = Budget(samples=10, elites=3, iterations=3, horizon=4, seed=5, spread=4000, least=100)
    actions, cost = plan(whole, state, z[0], budget)
    asked.append(Command("plan", z[0], budget))
    wanted.append(np.concatenate((actions.ravel(), np.array([cost], np.uint64).view(np.int16))))
    ask("step", actions[0], whole.step(state, actions[:1]).z[0])  # from where the plan began
    image = build.compile_image("world", target, tmp_path, arena)
    replies, stack = commands.run_world(target, image, program, SIZES, asked)
    for i, (command, reply, want) in enumerate(zip(asked, replies, wanted, strict=True)):
        assert reply.status == "ok", f"{i}: {command.verb}"
        if want is not None:
            np.testing.assert_array_equal(reply.values, want, err_msg=f"{i}: {command.verb}")
    assert (stack == 0) == (target is None)


@pytest.mark.cortex
def test_firmware_has_its_program_in_flash(worlds, tmp_path):
    """An STM32F405, without the decoder: what observes a picture, imagines, and says how far off it was."""
    _, whole = worlds
    program, arena = write_world(whole, decoder=False)
    write_table(tmp_path, program, arena)
    board, frames = BOARDS["stm32f405"], pictures(np.random.default_rng(7), 2)
    z, action = whole.encode(frames), np.array([[900, -1200]], np.int16)
    state = whole.step(State(z[:1], np.zeros((1, whole.hidden), np.int16)), action)
    asked = [Command("picture", frames[0]), Command("begin", z[0]), Command("step", action[0]), Command("drift", z[1])]
    image = build.compile_image("world", board, tmp_path, arena, table=tmp_path)
    replies, _ = commands.run_world(board, image, b"", SIZES, asked)
    np.testing.assert_array_equal(replies[0].values, z[0])
    np.testing.assert_array_equal(replies[2].values, state.z[0])
    np.testing.assert_array_equal(replies[3].values, whole.gauge.drift(state.z, z[1:]))


def test_plans_in_integers_reach_what_known_actions_reach(worlds):
    """A goal that known actions lead to: the plan costs about what they do, and the middle action more."""
    _, whole = worlds
    rng = np.random.default_rng(8)
    state = State(whole.encode(pictures(rng, 1)), np.zeros((1, whole.hidden), np.int16))
    budget = Budget(samples=64, elites=8, iterations=8, horizon=3, seed=1, spread=9000, least=50)
    there, on_the_way = state, []
    for native in rng.uniform(0, 512, (3, 1, 2)).astype(np.float32):
        there = whole.step(there, whole.actions.run(native))
        on_the_way.append(there.z[0].astype(np.int64))
    known = sum(int(np.square(z - there.z[0]).sum()) for z in on_the_way)
    _, planned = plan(whole, state, there.z[0], budget)
    _, middle = plan(whole, state, there.z[0], replace(budget, samples=1, elites=1, iterations=1))
    assert planned < 1.02 * known
    assert planned < 0.9 * middle


@needs_compiler
def test_calls_in_a_wrong_order_are_refused(worlds, tmp_path):
    _, whole = worlds
    program, arena = write_world(whole)
    image = build.compile_image("world", None, tmp_path, arena)
    zero = np.zeros(2, np.int16)
    replies, _ = commands.run_world(None, image, program, SIZES, [Command("step", zero)])
    assert replies[0].status == "wrong_order"
    with pytest.raises(WorldlineError, match="damaged"):
        commands.run_world(None, image, program[:-1] + bytes([program[-1] ^ 1]), SIZES, [])
    with pytest.raises(WorldlineError, match="not_a_program"):
        commands.run_world(None, image, b"x" * 400, SIZES, [])


@needs_compiler
def test_a_bundle_is_a_world(worlds, bundle):
    _, whole = worlds
    world = load_world(bundle)
    assert isinstance(world, Int8World)
    frames = pictures(np.random.default_rng(4), 6)
    z = world.encode(torch.from_numpy(frames).reshape(2, 3, 32, 32, 3))
    want = whole.encode(frames).reshape(2, 3, -1)
    np.testing.assert_array_equal(np.round(z.numpy() / whole.scale), want)
    native = np.random.default_rng(5).uniform(-20, 540, (2, 5, 2)).astype(np.float32)  # some beyond the range
    actions = whole.actions.run(native)
    state = whole.begin(want, actions[:, :2])
    rollout = world.rollout(world.begin(z, torch.from_numpy(native[:, :2])), torch.from_numpy(native[:, 2:]))
    for t in range(3):
        state = whole.step(state, actions[:, 2 + t])
        np.testing.assert_array_equal(np.round(rollout[:, t].numpy() / whole.scale), state.z)
    np.testing.assert_array_equal(world.decode(rollout[:, -1]).numpy(), whole.decode(state.z))
    (bundle / PROGRAM).write_bytes((bundle / PROGRAM).read_bytes()[:-1])
    with pytest.raises(WorldlineError, match="SHA-256"):
        load_world(bundle)


@needs_compiler
@pytest.mark.parametrize("board", ["host", *ON_BOARDS])
def test_firmware_plays_a_session_to_the_same_chain(worlds, bundle, tmp_path, board):
    workload = open_workload(bundle)
    rng = np.random.default_rng(6)
    seed, chains, events = 1, [], []

    def happened(kind: Kind, cause: bytes, chain: bytes, **seen: np.ndarray) -> None:
        events.append(images.Event(_EVENT.pack(kind, len(events), len(cause)) + cause, **seen))
        chains.append(chain)

    with Engine(workload) as engine:
        genesis = _genesis(engine.layout)
        starts, frame = workload.starts, engine.reset(seed)
        happened(Kind.RESET, struct.pack("<q", seed), frame.chain, pictures=starts.frames[1], actions=starts.actions[1])
        for action in rng.uniform(-50, 560, (12, 2)).astype(np.float32):
            happened(Kind.STEP, action.tobytes(), engine.step(action).chain, actions=action[None])
    target = None if board == "host" else BOARDS[board]
    program = (bundle / PROGRAM).read_bytes()
    image = build.compile_image("player", target, tmp_path / board, write_world(worlds[1])[1])
    given, _ = images.exchange(target, image, "player", images.session(genesis, events), program)
    assert given == b"".join(chains)
    assert images.playing(worlds[1], genesis, events).wanted == given
