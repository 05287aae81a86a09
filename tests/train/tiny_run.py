"""A run that takes seconds: two_room at 32 pixels, every term switched on, averaged weights in the first stage."""

from pathlib import Path

from worldline.data.collect import CollectConfig, collect
from worldline.model.world import WorldConfig
from worldline.train.config import StageConfig, TrainConfig


def collect_tiny(path: Path) -> Path:
    return collect(CollectConfig(env="two_room", path=str(path), episodes=12, steps=40, seed=3, workers=1))


def tiny_config(data: Path, path: Path) -> TrainConfig:
    return TrainConfig(
        data=data,
        path=path,
        model=WorldConfig(image_size=32, latent_dim=16, conv_width=8, conv_head=8, hidden=32, decoder_width=8),
        joint=StageConfig(
            steps=30,
            batch=4,
            rollout=12,
            rollout_start=4,
            target_stride=2,
            one_step=0.5,
            sigreg=0.1,
            grounding=10.0,
            rollout_pixels=1.0,
            inverse_dynamics=0.1,
            features=1.0,
            loose_frames=8,
            latent_noise=0.1,
            foreground=4.0,
            pixel_frames=16,
            projections=16,
            warmup=5,
            ema=0.9,
            straightening=0.01,
            variance=0.1,
            covariance=0.1,
            time_similarity=0.01,
            pushforward_noise=0.1,
        ),
        frozen=StageConfig(
            steps=20,
            batch=8,
            rollout=30,
            rollout_start=10,
            warmup=5,
            inverse_dynamics=0.1,
            rollout_inverse=0.1,
            excess_growth=0.1,
            rollout_sigreg=0.01,
            projections=16,
        ),
        seed=1,
        threads=1,
        log_every=1,
        checkpoint_every=6,
        validation_windows=8,
    )
