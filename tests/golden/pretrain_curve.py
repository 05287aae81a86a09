"""Make the golden curve of pre-training, `pretrain_curve.json`: `python tests/golden/pretrain_curve.py`.

One process without a process group, on one thread. Regenerate it only when training is meant to change, with a line in
the changelog that says why.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from toy_clips import ToyClips, toy_config

from worldline.core.files import write_json
from worldline.core.result import provenance
from worldline.train import pretrain as module
from worldline.train.pretrain import pretrain

CURVE = Path(__file__).parent / "pretrain_curve.json"


def read_curve(run: Path) -> list[float]:
    """Return the loss of each update."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [loss for line in lines for loss in line["losses"]]


if __name__ == "__main__":
    module.open_clips = lambda path: ToyClips()
    with tempfile.TemporaryDirectory() as directory:
        run = pretrain(toy_config(Path(directory) / "run"))
        record = {
            "generator": "python tests/golden/pretrain_curve.py",
            "versions": provenance()["versions"],
            "relative_tolerance": 0.001,
            "loss": read_curve(run),
            "batches": [json.loads(line)["batch"] for line in (run / "batches.jsonl").read_text().splitlines()],
        }
    write_json(CURVE, record)
    print(f"wrote {CURVE}")
