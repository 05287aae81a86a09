"""The device that was asked for."""

from __future__ import annotations

from worldline.core.errors import WorldlineError


def require_device(device: str) -> None:
    """Raise WorldlineError for a device that torch does not see here."""
    import torch

    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise WorldlineError(f"device={device}: torch sees no such device here; give device=cpu")
