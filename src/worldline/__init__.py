"""worldline: latent world models you can train, trust, play and shrink.

Importing the package is cheap: torch is loaded only when a name below is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["WorldlineError", "__version__", "load_world", "open_dataset"]

_LAZY = {
    "WorldlineError": "worldline.core.errors",
    "load_world": "worldline.model.checkpoint",
    "open_dataset": "worldline.data.lerobot",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'worldline' has no attribute {name!r}")
