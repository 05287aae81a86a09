"""The device that was asked for."""

from __future__ import annotations

import os

from worldline.core.errors import WorldlineError


def require_device(device: str) -> None:
    """Raise WorldlineError for a device that torch does not see here.

    For a CUDA device cuBLAS is told, which must be before it is first used, to keep workspaces with which its products
    repeat to the bit.
    """
    import torch

    if device == "cpu":
        return
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        raise WorldlineError(f"device={device}: torch sees no such device here; give device=cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
