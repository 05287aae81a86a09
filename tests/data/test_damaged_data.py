"""Damage to data that carries no checksums: one line that names the file, whatever the damage, and never a crash."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_toys import foreign_dataset, make_episodes, write

from worldline.core.errors import WorldlineError
from worldline.data.lerobot import SIDECAR, open_dataset


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_dataset(tmp_path_factory.mktemp("foreign") / "so100")


@pytest.fixture
def copy(foreign: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(foreign, tmp_path / "so100"))


@pytest.mark.parametrize("pattern", ["meta/info.json", "meta/episodes/*/*.parquet", "data/*/*.parquet"])
def test_any_damage_is_one_clear_error_or_none(copy: Path, pattern: str) -> None:
    path = next(copy.glob(pattern))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    told = []
    for _ in range(60):
        content = bytearray(whole)
        if rng.random() < 0.3:
            content = content[: rng.integers(len(whole))]
        else:
            at, count = rng.integers(len(whole)), rng.integers(1, 40)
            content[at : at + count] = rng.bytes(len(content[at : at + count]))
        path.write_bytes(content)
        try:
            open_dataset(copy)
        except WorldlineError as error:
            told.append(str(error))
    assert len(told) > 20
    assert all("\n" not in line and str(copy) in line for line in told)


def changed_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda info: info.clear(),
            "expected a JSON object with codebase_version, fps, .* got one without codebase_version",
        ),
        (lambda info: info.pop("features"), "expected .* got one without features"),
        (lambda info: info.update(features=[]), "expected features, each with dtype and shape"),
        (lambda info: info["features"].update(action={}), "expected features, each with dtype and shape"),
        (lambda info: info.update(fps=0), "expected a positive number as fps, got 0"),
        (lambda info: info.update(fps="ten"), "expected a positive number as fps, got 'ten'"),
    ],
)
def test_a_wrong_info_is_told(copy: Path, change: Callable[[dict[str, Any]], object], told: str) -> None:
    changed_json(copy / "meta/info.json", change)
    with pytest.raises(WorldlineError, match=rf"info\.json: {told}"):
        open_dataset(copy)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "got list"),
        ('{"format": 1}', "without spec"),
        ('{"spec": 1, "split_key": "", "files": {}}', "checksum differs"),
    ],
)
def test_a_foreign_sidecar_is_told(copy: Path, content: str, told: str) -> None:
    (copy / SIDECAR).write_text(content)
    with pytest.raises(WorldlineError, match=told):
        open_dataset(copy)


def test_a_spec_of_another_make_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "toy", make_episodes(3))
    changed_json(path / SIDECAR, lambda sidecar: sidecar.update(spec={"name": "toy"}))
    with pytest.raises(WorldlineError, match="its spec is not one that this version reads"):
        open_dataset(path)


def test_a_missing_column_is_named(copy: Path) -> None:
    path = next(copy.glob("meta/episodes/*/*.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["length"]), path)
    with pytest.raises(WorldlineError, match=r"expected the columns \['length'\], which are not there"):
        open_dataset(copy)


def test_actions_that_are_words_are_named(copy: Path) -> None:
    for path in copy.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        words = pa.array(["left"] * len(table))
        pq.write_table(table.set_column(table.column_names.index("action"), "action", words), path)
    with pytest.raises(WorldlineError, match="action: expected numbers, got values such as 'left'"):
        open_dataset(copy)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
def test_a_disk_that_is_full_is_an_error_and_leaves_no_half_cache(copy: Path) -> None:
    """Here by a limit on the size of files, which fails as a full disk does."""
    code = (
        "import resource, signal, sys\n"
        "from worldline.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"sys.exit(main(['train', 'data={copy}', 'path={copy.parent / 'run'}']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, "TERM": "dumb"}
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "worldline: File too large; lift the limit on the size of files (ulimit -f), or choose another place\n"
    )
    assert [path.name for path in (copy / ".cache").glob("*frames*")] == []
