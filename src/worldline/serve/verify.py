"""Verify a recording in a process of its own, so that the session keeps its pace: JSON lines on standard output.

python -m worldline.serve.verify CHECKPOINT FILE
"""

from __future__ import annotations

import json
import os
import sys
import time

from worldline.core.errors import WorldlineError

_REPORT_SECONDS = 0.1


def main(checkpoint: str, path: str) -> None:
    """Print `{"done", "total"}` while at it and `{"equal", "text"}` at the end."""
    from worldline.engine.recording import Recording
    from worldline.engine.replay import verify
    from worldline.engine.workloads import open_for

    if hasattr(os, "nice"):
        os.nice(5)
    reported = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal reported
        if (now := time.monotonic()) - reported >= _REPORT_SECONDS:
            reported = now
            _say({"done": done, "total": total})

    try:
        verdict = verify(path, open_for(Recording(path), checkpoint), progress)
    except WorldlineError as error:
        _say({"equal": False, "text": str(error)})
        return
    _say({"equal": verdict.ok, "text": str(verdict)})


def _say(data: dict[str, object]) -> None:
    print(json.dumps(data), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
