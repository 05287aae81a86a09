"""Who may import whom, held by reading every module's imports; and what `import worldline` must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/worldline"

FLOOR = {"core"}
MAY_IMPORT = {
    "core": FLOOR,
    "data": FLOOR | {"data"},
    "model": FLOOR | {"model"},
    "train": FLOOR | {"data", "model", "train"},
    "planning": FLOOR | {"data", "model", "planning"},
    "engine": FLOOR | {"data", "model", "engine"},
    "edge": FLOOR | {"data", "model", "edge"},
    "evaluate": FLOOR | {"data", "model", "planning", "evaluate"},
    "serve": FLOOR | {"data", "model", "planning", "engine", "serve"},
}
"""Subpackage -> subpackages it may import. `bench` and the modules of the command line may import all."""
UPPER = {
    "bench",
    "checkpoints",
    "cli",
    "commands",
    "config",
    "doctor",
    "explain",
    "listing",
    "quickstart",
    "sweep",
    "__main__",
    "__init__",
}
HYDRA_ONLY_IN = "cli.py"


def imports(source: str, package: str) -> set[str]:
    """Return the dotted names that a module's source imports anywhere; `package` is the module's own package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(part: str, source: str, package: str) -> list[str]:
    """Return what a module of subpackage `part` imports and may not."""
    wrong = []
    for name in sorted(imports(source, package)):
        top, *rest = name.split(".")
        if top == "worldline" and rest and part in MAY_IMPORT:
            known_above = rest[0] in UPPER - {"__init__"}
            known_part = rest[0] in MAY_IMPORT
            if known_above or (known_part and rest[0] not in MAY_IMPORT[part]):
                wrong.append(f"{part} imports {name}")
    return wrong


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_every_part_has_a_rule() -> None:
    unknown = {part_of(path) for path in modules()} - MAY_IMPORT.keys() - UPPER
    assert not unknown, f"say in docs/architecture.md and here who may import {unknown}"


def test_imports_go_one_way() -> None:
    wrong = []
    for path in modules():
        package = ".".join(("worldline", *path.relative_to(SOURCE).parts[:-1]))
        wrong += [f"{path.name}: {text}" for text in violations(part_of(path), path.read_text(), package)]
    assert not wrong


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("core", "import worldline.data.lerobot"),
        ("model", "def f():\n    from worldline.train.loop import train"),
        ("engine", "from worldline import train"),
        ("evaluate", "from ..train import loop"),
        ("serve", "from worldline.evaluate.run import evaluate"),
        ("data", "from worldline import cli"),
    ],
)
def test_a_wrong_import_is_seen(part: str, source: str) -> None:
    assert violations(part, source, f"worldline.{part}")


def test_only_the_command_line_knows_hydra() -> None:
    knowing = {
        str(path.relative_to(SOURCE))
        for path in modules()
        for name in imports(path.read_text(), "worldline")
        if name.split(".")[0] in ("hydra", "omegaconf")
    }
    assert knowing == {HYDRA_ONLY_IN}


def test_importing_the_package_is_cheap() -> None:
    heavy = ("torch", "ray", "hydra", "omegaconf", "pyarrow", "matplotlib", "rich")
    code = f"import sys, worldline, worldline.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
