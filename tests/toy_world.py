"""A small world that several tests share."""

from worldline.core.types import WorldSpec
from worldline.model import WorldConfig

SPEC = WorldSpec(
    name="toy",
    image_size=32,
    step_seconds=0.04,
    action_names=("x", "y"),
    action_low=(0.0, 0.0),
    action_high=(512.0, 512.0),
)
TINY = WorldConfig(image_size=32, latent_dim=24, conv_width=8, hidden=48, decoder_width=8)
