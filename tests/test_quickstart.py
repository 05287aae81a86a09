"""The whole way with one command, at a size that takes seconds: killed on the way, finished, and used again."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from worldline.cli import main
from worldline.core.files import read_json

SMALL = """quickstart play=false collect.episodes=60 collect.steps=64 collect.workers=1
references.image_size=32 references.encoder_updates=120 references.encoder_batch=32 references.max_frames=2000
references.actions_updates=20 references.horizon=20
train.model.image_size=32 train.model.latent_dim=8 train.model.conv_width=8 train.model.hidden=16
train.model.decoder_width=8 train.joint.steps=4 train.joint.batch=4 train.joint.pixel_frames=8
train.joint.projections=8 train.frozen.steps=3 train.frozen.batch=4 train.frozen.rollout=20
train.frozen.rollout_start=0 train.validation_windows=4
evaluate.horizon=20 evaluate.windows=200 evaluate.draws=100 evaluate.train_frames=400 evaluate.validation_frames=100
"""


def test_killed_on_the_way_it_goes_on_and_what_is_finished_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "worldline", *SMALL.split()], stdout=subprocess.DEVNULL)
    references = tmp_path / "datasets/quickstart-two_room/references/references.json"
    while process.poll() is None and not references.exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    evaluation = tmp_path / "runs/quickstart-two_room/evaluation"
    assert not evaluation.exists()

    assert main(SMALL.split()) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^\[(\d)/4\] .* used again", shown, flags=re.MULTILINE) == ["1", "2"]
    assert re.search(r"done in \d+ s: .*H\* \d+ steps", shown)
    assert (evaluation / "report.html").stat().st_size > 100_000
    assert read_json(evaluation / "result.json")["windows"]["count"] == 200

    assert main(SMALL.split()) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^\[(\d)/4\] .* used again", shown, flags=re.MULTILINE) == ["1", "2", "3", "4"]
    main(["list"])
    assert re.search(r"runs/quickstart-two_room +two_room, .* H\* \d+ steps", capsys.readouterr().out)
