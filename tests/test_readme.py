"""The README's promises: its Python example runs, its commands and files exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from worldline.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/setup_guide.md")
SHIPPED = ROOT / "src/worldline/shipped/pusht/world.json"
needs_world = pytest.mark.skipif(not SHIPPED.exists(), reason="the shipped world pusht is not there yet")


def python_example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_example_has_about_ten_lines() -> None:
    statements = [line for line in python_example().splitlines() if line and not line.startswith(("import", "from"))]
    assert len(statements) <= 10


@needs_world
def test_the_example_runs_and_draws_a_filmstrip(tmp_path: Path) -> None:
    from PIL import Image

    done = subprocess.run(
        [sys.executable, "-c", python_example()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "drift gauge" in done.stdout
    with Image.open(tmp_path / "filmstrip.png") as strip:
        assert strip.width == 10 * strip.height
        assert len(strip.getcolors(maxcolors=1 << 24) or ()) > 20  # a picture, not a blank


@needs_world
def test_pictures_are_there() -> None:
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).is_file(), target


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_links_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    code = "\n".join(
        re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    )
    named = set(re.findall(r"(?:^|[ /])worldline ([a-z]+)", code, flags=re.MULTILINE))
    assert named, "the page names no command"
    assert named <= COMMANDS.keys()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", code)) <= targets
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link


@needs_world
@pytest.mark.parametrize("script", ["readme", "phases", "model_card", "roadmap"])
def test_the_figures_are_those_of_the_reports(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_of_results_is_that_of_the_newest_reports() -> None:
    from worldline.bench.results_page import page_text

    page = ROOT / "docs/reports/evaluation_results.md"
    assert page.read_text() == page_text(page.parent, ROOT / "reports"), "run: worldline ablate train=false"
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert page.parent.joinpath(link).exists(), link
