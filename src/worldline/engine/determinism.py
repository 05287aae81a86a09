"""What the engine promises about bits, and the settings of torch that the promise rests on.

| level | promise | what it takes |
|---|---|---|
| `off` | none | nothing: torch's settings stay, no hash is taken, nothing can be recorded |
| `run` | equal actions give equal bits within one process | pinned threads; autotuning may choose once |
| `machine` | and across processes on one machine | deterministic algorithms; no autotuning, no TF32, no reduced sums |

No level promises bits across machines: another CPU or GPU, driver or build of torch may round differently. The
fingerprint holds what a level rests on, so that a verdict can say what was different.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch

from worldline.core.errors import WorldlineError

Level = Literal["off", "run", "machine"]
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def prepare(level: Level, cuda: bool) -> None:
    """See to what must be settled before a CUDA context is made.

    Raises:
        WorldlineError: it has been made already, without.
    """
    if level == "machine" and cuda and _WORKSPACE not in os.environ:
        if torch.cuda.is_initialized():
            raise WorldlineError(
                f"determinism=machine on CUDA wants {_WORKSPACE}=:4096:8 in the environment before CUDA is first used; "
                "set it and start again, or give determinism=run"
            )
        os.environ[_WORKSPACE] = ":4096:8"


@contextmanager
def arithmetic(level: Level, threads: int, cuda: bool = False) -> Iterator[None]:
    """Inference mode and a level's settings, put back afterwards. Some belong to the calling thread, so that this is
    entered around every frame."""
    with ExitStack() as stack:
        if level != "off":
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            stack.callback(torch.set_num_threads, before)
        if level == "machine":
            _be_deterministic(stack, cuda)
        with torch.inference_mode():
            yield


def _be_deterministic(stack: ExitStack, cuda: bool) -> None:
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not enabled or only_warns:
        torch.use_deterministic_algorithms(True)
        stack.callback(torch.use_deterministic_algorithms, enabled, warn_only=only_warns)
    # new memory need not be filled: no stage reads what nobody has written, and a replay would show it
    settings: list[tuple[Any, str, Any]] = [(torch.utils.deterministic, "fill_uninitialized_memory", False)]
    if cuda:
        matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)  # its conv has no type
        settings += [
            (cudnn, "deterministic", True),
            (cudnn, "benchmark", False),
            # the parent first: those that follow it need no word, and are left following it
            (cudnn, "fp32_precision", "ieee"),
            *((child, "fp32_precision", "ieee") for child in (cudnn.conv, cudnn.rnn, matmul)),
            (matmul, "allow_bf16_reduced_precision_reduction", False),
            (matmul, "allow_fp16_reduced_precision_reduction", False),
        ]
    for where, name, value in settings:
        if (now := getattr(where, name)) != value:
            setattr(where, name, value)
            stack.callback(setattr, where, name, now)
