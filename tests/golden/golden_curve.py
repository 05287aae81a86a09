"""Make the golden curve: `python tests/golden/golden_curve.py` trains 50 tiny steps and writes `curve.json` beside it.

Regenerate it only when training is meant to change, with a line in the changelog that says why.
"""

import json
import tempfile
from pathlib import Path

from worldline.core.files import write_json
from worldline.core.result import provenance
from worldline.data.collect import CollectConfig, collect
from worldline.model.world import WorldConfig
from worldline.train.config import StageConfig, TrainConfig
from worldline.train.loop import train

CURVE = Path(__file__).parent / "curve.json"


def make_curve(directory: Path) -> dict[str, list[float]]:
    """Return the loss of each of 30 joint and 20 frozen updates on one thread, and the validation errors."""
    data = collect(
        CollectConfig(env="two_room", path=str(directory / "data"), episodes=12, steps=40, seed=11, workers=1)
    )
    config = TrainConfig(
        data=data,
        path=directory / "run",
        model=WorldConfig(image_size=32, latent_dim=16, conv_width=8, conv_head=8, hidden=32, decoder_width=8),
        joint=StageConfig(
            steps=30,
            batch=8,
            rollout=12,
            target_stride=2,
            one_step=0.5,
            sigreg=0.1,
            grounding=10.0,
            rollout_pixels=1.0,
            features=1.0,
            loose_frames=8,
            latent_noise=0.1,
            inverse_dynamics=0.1,
            foreground=4.0,
            pixel_frames=32,
            projections=32,
            warmup=5,
        ),
        frozen=StageConfig(steps=20, batch=16, rollout=30, rollout_start=10, warmup=5),
        seed=1,
        threads=1,
        log_every=1,
        checkpoint_every=50,
        validation_windows=8,
    )
    lines = [json.loads(line) for line in (train(config) / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [line["loss"] for line in lines if "loss" in line],
        "rollout_error": [line["validation"]["rollout_error"] for line in lines if "validation" in line],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        found = make_curve(Path(directory))
    made = provenance()
    record = {
        "generator": "python tests/golden/golden_curve.py",
        "versions": made["versions"],
        "processor": made["machine"]["processor"],
        "relative_tolerance": 0.01,
        "curve": found,
    }
    write_json(CURVE, record)
    print(f"wrote {CURVE}")
