"""The command line as a person meets it: help that is complete, mistakes answered in one line, exit statuses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from worldline import cli, config, doctor, listing
from worldline.cli import main
from worldline.commands import COMMANDS
from worldline.core.errors import WorldlineError

WITH_OPTIONS = [name for name, command in COMMANDS.items() if command.config]


def worldline(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worldline", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Help


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from worldline.cli import main; main(['--help'])\n"
        "print([name for name in ('torch', 'hydra', 'omegaconf', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert all(name in done.stdout for name in COMMANDS if " " not in name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: worldline {name}")
    assert all(line in shown for line, _ in COMMANDS[name].examples)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_every_option_has_a_default_and_a_meaning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([*name.split(), "--help"])
    shown = capsys.readouterr().out.split("Options, with their defaults:\n")[1]
    options = dict(re.findall(r"^  ([\w.]+)=\S*(.*)$", shown, flags=re.MULTILINE))
    assert options.keys() == config.flatten(cli._compose(COMMANDS[name], [])).keys()
    assert [option for option, meaning in options.items() if not meaning.strip()] == []


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_presets_pick_only_options_that_exist(name: str) -> None:
    command = COMMANDS[name]
    for group, presets in cli._groups(command).items():
        for preset in presets:
            options = [f"{group}={preset}"]
            composed = cli._compose(command, options)
            config.build(cli._load(command.config), {key: value for key, value in composed.items() if value != "???"})


# Mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("trian", "did you mean 'train'?"),
        ("collect env=two_rom", "did you mean 'two_room'?"),
        ("collect episods=3", "did you mean 'episodes'?"),
        ("collect episodes=many", "'episodes' wants a whole number, got 'many'"),
        ("collect episodes=2.5", "'episodes' wants a whole number, got 2.5"),
        ("collect episodes=", "'episodes' wants a whole number"),
        ("collect episodes=-1", "at least 1"),
        ("collect episodes=[1", "cannot read"),
        ("collect two_room", "takes no path"),
        ("collect --fast", "no flag '--fast'"),
        ("doctor port=1", "takes no options"),
        ("train steps=5", "did you mean 'joint.steps' or 'frozen.steps'?"),
        ("train model.encoder=convv", "did you mean 'conv'?"),
        ("train model=tinny", "did you mean 'tiny'?"),
        ("train data=nowhere", "not one of its presets, nor a path"),
        ("train data=no/where", "no LeRobot dataset here"),
        ("train", "datasets/pusht: no LeRobot dataset here"),
        ("evaluate", "needs a CHECKPOINT"),
        ("evaluate nosuch", "no such world"),
        ("play nosuch", "no such world"),
        ("play port=99999", "0 to 65535"),
        ("replay nosuch.wlr", "nosuch.wlr"),
        ("list nowhere", "no such folder"),
        ("train jont.steps=5", "did you mean 'joint.steps'?"),
        ("collect env=two_room path=a_file/x", "Not a directory; choose a place that can be written to"),
        ("bench nosuch", "no benchmark called 'nosuch'"),
        ("references nowhere", "no LeRobot dataset here"),
        ("pretrain data=nowhere", "nowhere: no clips here"),
        ("pretrain nowhere model=vit_hug", "did you mean 'vit_huge'?"),
        ("references nowhere image_size=50", "image_size must be a positive multiple of 16"),
        ("references nowhere encoder_update=3", "did you mean 'encoder_updates'"),
        ("references image_size=32", "needs a DATASET"),
        ("train seed=0,1", "a sweep wants --multirun"),
        ("train -m seed=0", "give an option several values"),
        ("train -m path=a,b", "each job gets a path of its own"),
        ("train -m seed=interval(0,1)", "write the values as seed=0,1,2"),
        ("train -m seed=0,0", "two jobs of this sweep are the same"),
        ("train -m seed=0,1 model=tinny,tiny", "did you mean 'tiny'?"),
        ("collect -m env=pusht,two_rom", "did you mean 'two_room'?"),
        ("doctor -m", "no flag '--multirun'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: str, told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "a_file").write_text("")
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("worldline: ")
    assert error.count("\n") == 1
    assert told in error


def test_a_mistake_in_a_process_shows_no_traceback(tmp_path: Path) -> None:
    done = worldline("train", "data=/nowhere/at all", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("worldline: /nowhere/at all: no LeRobot dataset here")
    assert done.stderr.count("\n") == 1


# Sweeps


def test_a_sweep_gives_every_job_its_path_and_passes_over_what_is_finished(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["collect", "-m", "env=two_room", "seed=range(2)", "episodes=1,2", "steps=8", "image_size=32", "workers=1"]
    (here / "datasets").mkdir()
    (here / "datasets/two_room-seed_1-episodes_1").write_text("in the way")
    assert main(words) == 2
    told = capfd.readouterr()
    table = [line.split() for line in told.out.split("\n\n")[-1].splitlines()]
    assert [row[:3] for row in table] == [
        ["seed", "episodes", "job"],
        ["0", "1", "done"],
        ["0", "2", "done"],
        ["1", "1", "status"],
        ["1", "2", "done"],
    ]
    assert told.err.count("datasets/two_room-seed_1-episodes_1") == 1
    made = {path: path.stat().st_mtime_ns for path in here.glob("datasets/*-episodes_?/meta/info.json")}
    assert len(made) == 3
    (here / "datasets/two_room-seed_1-episodes_1").unlink()
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert len(list(here.glob("datasets/*/meta/info.json"))) == 4


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A config with one of each kind of field."""

    place: Path
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)
    """Pixels."""
    limit: int | None = None  # steps
    on: bool = False


def test_config_is_converted_strictly() -> None:
    made = config.build(Outer, {"place": "a/b", "inner": {"rate": 1}, "sizes": [3], "limit": 4.0})
    assert made == Outer(place=Path("a/b"), inner=Inner(rate=1.0), sizes=(3,), limit=4)
    wrong = [
        ({"place": "x", "siezs": [1]}, "did you mean 'sizes'"),
        ({}, "'place' has no default"),
        ({"place": "???"}, "'place' has no default"),
        ({"place": "x", "on": 1}, "'on' wants true or false, got 1"),
        ({"place": "x", "limit": "4"}, "'limit' wants a whole number"),
        ({"place": "x", "limit": True}, "'limit' wants a whole number"),
        ({"place": "x", "inner": {"kind": "c"}}, "'inner.kind' cannot be 'c'"),
        ({"place": "x", "inner": 3}, "'inner' wants options such as rate, kind"),
        ({"place": "x", "sizes": [1.5]}, "'sizes[0]' wants a whole number"),
    ]
    for values, told in wrong:
        with pytest.raises(WorldlineError, match=re.escape(told)):
            config.build(Outer, values)


def test_meanings_come_from_where_options_are_defined() -> None:
    assert config.meanings(Outer)["sizes"] == "Pixels."
    assert config.meanings(Outer)["limit"] == "steps"


# Commands


def test_collect_reads_presets_and_overrides_and_says_what_it_wrote(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["collect", "env=two_room", "collect.episodes=3", "steps=8", "workers=1", "path=a place/x"]
    assert main(words) == 0
    assert "wrote a place/x: " in capsys.readouterr().out
    assert json.loads((here / "a place/x/meta/info.json").read_text())["total_episodes"] == 3
    assert main(words) == 0
    assert main([*words, "steps=9"]) == 2  # another collection in the same place


def test_interrupting_says_what_is_kept_and_gives_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worldline", "collect", "env=two_room", "episodes=100000", "path=big"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("big.partial/episode-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped. Finished episodes stay in big.partial" in error
    assert "Traceback" not in error


def make_checkpoint(path: Path, weights_seed: int) -> Path:
    import torch

    from worldline.data.simulators import make_simulator
    from worldline.engine.workloads.latent import make_starts, save_starts
    from worldline.model.checkpoint import save_world
    from worldline.model.world import World, WorldConfig

    torch.manual_seed(weights_seed)
    config = WorldConfig(latent_dim=8, hidden=16, conv_width=8, decoder_width=8, context=2)
    save_world(path, World(config, make_simulator("two_room").spec).eval(), training={"note": "untrained"})
    save_starts(path, make_starts("two_room", config.context, count=2))
    return path


def test_replay_tells_equal_from_different(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from worldline.engine.runtime import Engine
    from worldline.engine.workloads.latent import LatentWorkload

    make_checkpoint(here / "world", 0)
    make_checkpoint(here / "other", 1)
    workload = LatentWorkload.open("world")
    with Engine(workload, record="session.wlr") as engine:
        engine.reset(1)
        for _ in range(5):
            engine.step(workload.action)
    assert main(["replay", "session.wlr"]) == 0
    assert "6 frames at" in capsys.readouterr().out
    assert main(["replay", "session.wlr", "--verify"]) == 0
    assert "6 frames, equal to the bit" in capsys.readouterr().out
    assert main(["replay", "session.wlr", "checkpoint=other", "--verify"]) == 1
    assert "differs at frame 0" in capsys.readouterr().out


def test_a_checkpoint_and_data_that_do_not_fit_are_told_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a reference pack is made, which takes minutes."""
    make_checkpoint(here / "world", 0)
    for env in ("pusht", "two_room"):
        main(["collect", f"env={env}", "episodes=3", "steps=8", "workers=1", f"path={env}"])
    capsys.readouterr()
    assert main(["evaluate", "world", "data=./pusht"]) == 2
    assert "world is a world of two_room, ./pusht holds episodes of pusht" in capsys.readouterr().err
    assert main(["evaluate", "world", "data=./two_room"]) == 2
    assert "needs at least 200 windows from 5 test episodes" in capsys.readouterr().err
    assert not list(here.glob("*/references"))


@pytest.mark.parametrize("command", ["play", "evaluate"])
def test_a_damaged_checkpoint_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    main(["collect", "env=two_room", "episodes=3", "steps=8", "workers=1", "path=data"])
    weights = make_checkpoint(here / "world", 0) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    capsys.readouterr()
    for damaged in (bytes(content), bytes(content[:-10]), b""):
        weights.write_bytes(damaged)
        assert main([command, "world", *(["data=./data"] if command == "evaluate" else [])]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "is not the file its card describes" in error


def test_list_shows_what_is_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["collect", "env=two_room", "episodes=3", "steps=8", "workers=1", "path=datasets/small"])
    clips = ["path=datasets/clips", "num_frames=2", "stride=1", "image_size=16"]
    assert main(["ingest", "datasets/small", "workers=1", *clips]) == 0
    (here / "datasets/broken/meta").mkdir(parents=True)
    (here / "datasets/broken/meta/info.json").write_text("{}")
    capsys.readouterr()
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"datasets/small +3 episodes, 24 frames", shown)
    assert re.search(r"datasets/broken +unreadable", shown)
    assert re.search(r"datasets/clips +12 clips of 2 frames at 16 px as jpeg, 0 of 3 entries rejected", shown)
    assert re.search(r"two_room +ready", shown)


def test_headline_says_what_ended_trust() -> None:
    result = {
        "valid": True,
        "hri": {"10": 0.9, "100": 0.614},
        "h_star": 57,
        "h_star_seconds": 2.28,
        "h_star_ended_by": "block_angle",
    }
    assert listing.headline(result) == "HRI_100 0.61, H* 57 steps (2.3 s, ended by block_angle)"
    assert listing.headline(result | {"valid": False}).startswith("invalid verdict")
    assert listing.headline({}) == "not evaluated"


def test_doctor_finds_everything_needed_and_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        checks = {check.name: check for check in doctor.examine(port)}
    assert checks["port"].state == "missing"
    assert checks["port"].remedy == f"worldline play port={port + 1}"
    assert {name for name, check in checks.items() if check.state == "broken"} <= {"disk"}
    shown = doctor.report([checks["port"], doctor.Check(name="torch", state="broken", finding="gone", remedy="get")])
    assert shown.endswith("broken: torch; optional and missing: port")
    assert "get it: get" in shown


def test_without_opencvs_libraries_doctor_says_which_and_pusht_is_told_in_one_line(tmp_path: Path) -> None:
    """A stand-in for a Debian without libgl1: importing OpenCV fails as it does there."""
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = (
        "import sys; from worldline import cli, doctor; print(doctor.report([doctor._pusht(), doctor._worlds()]));"
        "sys.exit(cli.main(['collect', 'env=pusht']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(r"missing +pusht +the PushT simulator does not load \(libGL", done.stdout)
    assert "get it: apt-get install libgl1 libglib2.0-0" in done.stdout
    assert done.stderr.startswith("worldline: the PushT simulator does not load (libGL")
    assert done.stderr.count("\n") == 1


def test_help_into_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        process = [sys.executable, "-m", "worldline", "list"]
        done = subprocess.run(process, cwd=tmp_path, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
