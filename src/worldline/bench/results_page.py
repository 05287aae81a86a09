"""docs/reports/evaluation_results.md: the newest reports on system, stability and scalability on one page."""

from __future__ import annotations

import os
import re
from pathlib import Path

from worldline.core.files import read_json, write_bytes

PARTS = {
    "System: on a microcontroller, beside TensorFlow Lite Micro": ("edge",),
    "Stability: drift and planning": ("ablate", "pusht", "vizdoom"),
    "Scalability: feeding and training": ("loader", "feed", "bottleneck", "pretrain", "memory"),
}
"""Each part with the names of its benchmarks, whose reports are `reports/DATE-NAME`."""


def write_page(page: Path, reports: Path) -> Path:
    """Write the page from the newest report of each benchmark; return its path."""
    write_bytes(page, page_text(page.parent, reports).encode())
    return page


def page_text(beside: Path, reports: Path) -> str:
    """Return the page as it is to stand in the folder `beside`, pictures linked where they lie.

    Every report was itself written from the `result.json` beside it.
    """
    lines = [
        "# Evaluation results",
        "",
        "Put together by `worldline ablate` from the newest reports; each says how to get its figures again.",
        "",
    ]
    for part, names in PARTS.items():
        lines += [f"## {part}", ""]
        for name in names:
            found = sorted(reports.glob(f"????-??-??-{name}/report.md"))
            lines += [_taken(found[-1], beside) if found else f"`{name}`: not yet measured.", ""]
    return "\n".join(lines)


def _taken(report: Path, beside: Path) -> str:
    """Return a report's text two headings deeper, its links seen from another folder, and where it comes from."""
    text = re.sub(r"^(#+) ", r"##\1 ", report.read_text(encoding="utf-8"), flags=re.MULTILINE).strip()
    folder = os.path.relpath(report.parent, beside)
    text = re.sub(r"\]\((?![a-z]+:|/|#)([^)]+)\)", lambda link: f"]({os.path.normpath(f'{folder}/{link[1]}')})", text)
    commit = read_json(report.with_name("result.json"))["provenance"]["commit"]
    return f"{text}\n\nFrom [{report.parent.name}]({folder}/report.md), commit {commit}."
