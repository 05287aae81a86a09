"""Our worlds as a frame loop: starts, anchors, bit-exact replay of a saved checkpoint in another process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, sha256_file, write_json
from worldline.data.simulators import make_simulator
from worldline.engine.recording import Recording
from worldline.engine.replay import seek, verify
from worldline.engine.runtime import Engine
from worldline.engine.workload import Anchorable
from worldline.engine.workloads.latent import LatentWorkload, Starts, load_starts, make_starts, save_starts
from worldline.model.checkpoint import CARD, save_world
from worldline.model.world import State, World, WorldConfig

SPEC = make_simulator("two_room").spec


def make_world(**config) -> World:
    torch.manual_seed(0)
    world = World(WorldConfig(latent_dim=16, hidden=32, conv_width=8, decoder_width=8, **config), SPEC)
    world.gauge.radius99.fill_(5.0)
    world.gauge.cycle99.fill_(2.0)
    for parameter in world.parameters():  # trained nets move; fresh ones predict no change
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return world.eval().requires_grad_(False)


def actions(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.3, 1.3, (count, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def starts() -> Starts:
    return make_starts("two_room", context=4, count=3)


@pytest.fixture(scope="module")
def checkpoint(starts: Starts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_world(tmp_path_factory.mktemp("worlds") / "small", make_world(), training={})
    assert save_starts(path, starts).stat().st_mode == (path / CARD).stat().st_mode
    return path


@pytest.fixture(scope="module")
def recorded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sessions") / "session.wlr"
    workload = LatentWorkload.open(checkpoint)
    truth = make_simulator("two_room")
    with Engine(workload, record=path, snapshot_every=10) as engine:
        engine.reset(1)
        workload.starts.begin_truth(truth, 1)
        for action in actions(25):
            engine.step(action)
            seen = truth.step(action)
        engine.anchor(seen.frame)
        for action in actions(10, 1):
            engine.step(action)
    return path


def test_the_true_world_begins_where_the_imagined_one_does(starts: Starts) -> None:
    simulator = make_simulator("two_room")
    for seed in range(4):
        seen = starts.begin_truth(simulator, seed)
        assert np.array_equal(seen.frame, starts.frames[seed % 3, -1])
    assert len({starts.frames[i, 0].tobytes() for i in range(3)}) == 3


def test_frames_are_what_the_world_says(starts: Starts) -> None:
    """The loop over static buffers computes what `begin`, `step` and `decode` compute, actions clipped to the spec."""
    world = make_world()
    engine = Engine(LatentWorkload(world, starts, mode="eager"))
    pictures = [engine.reset(2).picture.copy()]
    frames = [engine.step(action) for action in actions(6)]
    with torch.inference_mode():
        z = world.encode(torch.tensor(starts.frames[2]))
        state = world.begin(z[None], torch.tensor(starts.actions[2])[None])
        assert np.array_equal(pictures[0], world.decode(state.z)[0].numpy())
        for action in actions(6):
            state = world.step(state, torch.tensor(np.clip(action, -1, 1))[None])
        assert np.array_equal(frames[-1].picture, world.decode(state.z)[0].numpy())
        assert frames[-1].gauge["region"] == pytest.approx(float(world.gauge.region(state.z)))
        assert frames[-1].gauge["cycle"] == pytest.approx(float(world.gauge.cycle(world, state.z)))


def test_an_anchor_is_what_observe_does(starts: Starts) -> None:
    world = make_world()
    workload = LatentWorkload(world, starts, mode="eager")
    assert isinstance(workload, Anchorable)
    engine = Engine(workload)
    engine.reset(0)
    engine.step(actions(1)[0])
    real = starts.frames[1, 0]
    memory = workload.state()["memory.0"].clone()
    frame = engine.anchor(real)
    with torch.inference_mode():
        z = world.encode(torch.tensor(real)[None])
        assert torch.equal(workload.state()["z"], z)
        assert torch.equal(workload.state()["memory.0"], memory)
        assert np.array_equal(frame.picture, world.decode(z)[0].numpy())
        action = torch.tensor([[0.5, -0.25]])
        expected = world.step(State(z, (memory,)), action)
        engine.step(action[0].numpy())
        assert torch.equal(workload.state()["z"], expected.z)
    assert frame.id == 2


def test_a_checkpoint_replays_equal_in_a_fresh_process(recorded: Path, checkpoint: Path) -> None:
    code = (
        "import sys; from worldline.engine.replay import verify;"
        "from worldline.engine.workloads.latent import LatentWorkload as L;"
        f"verdict = verify({str(recorded)!r}, L.open({str(checkpoint)!r})); print(verdict); sys.exit(not verdict.ok)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "37 frames, equal to the bit"), done.stderr


@pytest.mark.parametrize("name", ["predictor.out.2.bias", "decoder", "encoder"])
def test_one_bit_of_any_weight_fails(recorded: Path, checkpoint: Path, name: str) -> None:
    workload = LatentWorkload.open(checkpoint)
    weight = next(tensor for key, tensor in workload.world.named_parameters() if key.startswith(name))
    weight.view(torch.int32).view(-1)[0] ^= 1
    verdict = verify(recorded, workload)
    assert not verdict.ok
    assert verdict.first_bad_frame is not None
    assert "other weights" in verdict.reason


def test_a_weight_byte_changed_in_the_file_is_refused_or_named(
    recorded: Path, checkpoint: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in checkpoint.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-70] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    with pytest.raises(WorldlineError, match="not the file its card describes"):
        LatentWorkload.open(changed)
    card = read_json(changed / "world.json")
    card["weights"]["sha256"] = sha256_file(changed / "model.safetensors")
    write_json(changed / "world.json", card)
    verdict = verify(recorded, LatentWorkload.open(changed))
    assert not verdict.ok
    assert "other weights" in verdict.reason


@pytest.mark.parametrize("predictor", ["gru", "transformer"])
def test_every_predictor_goes_on_from_a_snapshot(predictor: str, starts: Starts, tmp_path: Path) -> None:
    config = {"predictor": predictor, "window": 4, "transformer_width": 24, "transformer_depth": 1}
    path = tmp_path / f"{predictor}.wlr"
    with Engine(LatentWorkload(make_world(**config), starts), record=path, snapshot_every=7) as engine:
        engine.reset(0)
        for action in actions(30):
            last = engine.step(action)
    resumed = seek(path, LatentWorkload(make_world(**config), starts), 14)
    assert 13 in Recording(path).snapshots
    for action in actions(30)[14:]:
        again = resumed.step(action)
    assert again.chain == last.chain


def test_starts_that_are_missing_or_do_not_fit(checkpoint: Path, starts: Starts, tmp_path: Path) -> None:
    with pytest.raises(WorldlineError, match="no real frame to begin from"):
        load_starts(tmp_path, SPEC)
    (tmp_path / "starts.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WorldlineError, match="not a file of starts"):
        load_starts(tmp_path, SPEC)
    short = Starts(**{**vars(starts), "actions": starts.actions[:, :1]})
    save_starts(tmp_path, short)
    with pytest.raises(WorldlineError, match="does not fit the world"):
        load_starts(tmp_path, SPEC)
    with pytest.raises(WorldlineError, match="do not fit"):
        LatentWorkload(make_world(image_size=32), starts)
    assert np.array_equal(load_starts(checkpoint, SPEC).frames, starts.frames)


def test_one_real_frame_is_a_context_too(checkpoint: Path) -> None:
    engine = Engine(LatentWorkload(make_world(), make_starts("two_room", context=1, count=1)))
    engine.reset(5)
    assert engine.step(actions(1)[0]).id == 1


def test_a_gauge_that_was_not_fitted_is_not_read(starts: Starts) -> None:
    world = make_world()
    names = [stage.name for stage in LatentWorkload(world, starts, cycle=False).stages]
    assert names == ["step", "decode", "gauge"]
    world.gauge.radius99.zero_()
    engine = Engine(LatentWorkload(world, starts))
    assert engine.reset(0).gauge == {}


def test_a_prompt_is_refused(checkpoint: Path) -> None:
    with pytest.raises(WorldlineError, match="takes no prompt"):
        Engine(LatentWorkload.open(checkpoint)).reset(0, "a red block")


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_contracts_are_kept_in_every_mode(starts: Starts, mode: str) -> None:
    workload = LatentWorkload(make_world(), starts, mode=mode)
    assert all(stage.allocates == (mode == "eager") for stage in workload.stages)
    engine = Engine(workload, contracts="strict")
    engine.reset(0)
    for action in actions(300):
        engine.step(action)
    assert engine.contracts.found == []


def test_graph_and_eager_show_the_same(starts: Starts) -> None:
    eager, graph = (Engine(LatentWorkload(make_world(), starts, mode=mode)) for mode in ("eager", "graph"))
    assert graph.fingerprint["mode"] == "graph"
    for engine in (eager, graph):
        engine.reset(1)
    for action in actions(20):
        one, other = eager.step(action), graph.step(action)
        assert np.abs(one.picture.astype(int) - other.picture).max() <= 1
        assert one.gauge == pytest.approx(other.gauge, rel=1e-4)
    for engine in (eager, graph):
        one, other = other, engine.anchor(starts.frames[2, 0])
    assert np.abs(one.picture.astype(int) - other.picture).max() <= 1


def test_a_recording_is_opened_in_its_mode(checkpoint: Path, tmp_path: Path) -> None:
    for mode in ("eager", "graph"):
        with Engine(LatentWorkload.open(checkpoint, mode), record=tmp_path / f"{mode}.wlr") as engine:
            engine.reset(0)
            engine.step(actions(1)[0])
        recording = Recording(tmp_path / f"{mode}.wlr")
        assert LatentWorkload.open_for(recording).mode == mode
        assert verify(recording.path, LatentWorkload.open_for(recording, checkpoint)).ok
    with pytest.raises(WorldlineError, match="has a transformer; give mode=eager"):
        LatentWorkload(make_world(predictor="transformer"), make_starts("two_room", 4, 1), mode="graph")
