"""What every test runs under: one thread, no network of its own making, and only what the machine has."""

import os
import shutil
from importlib.util import find_spec

# Set before torch is loaded: the tests share the cores with each other, and one thread keeps the bits of golden files.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before any test uses CUDA

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say what it lacks."""
    reasons = {
        "gpu": "" if _has_cuda(items) else "needs a CUDA device",
        "browser": "" if shutil.which("chromium") and find_spec("playwright") else "needs chromium and playwright",
        "cortex": ""
        if shutil.which("arm-none-eabi-g++") and shutil.which("qemu-system-arm")
        else "needs gcc-arm-none-eabi, libnewlib-arm-none-eabi, libstdc++-arm-none-eabi-newlib and qemu-system-arm",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_cuda(items: list[pytest.Item]) -> bool:
    if not any(item.get_closest_marker("gpu") for item in items):
        return False  # spares loading torch
    import torch

    return torch.cuda.is_available()
