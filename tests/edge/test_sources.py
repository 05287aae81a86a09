"""The C++ itself: two compilers without a warning, clang-tidy, and a short run of the fuzzer on a fresh corpus."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from little_world import little_worlds

from worldline.core.native import LANGUAGE, TINYENGINE
from worldline.edge.program import write_world

IMAGES = ["world", "observer", "planner", "player", "cases"]
SOURCES = [*(f"firmware/{name}.cpp" for name in IMAGES), "host/library.cpp"]
HOST = ["-I", str(TINYENGINE / "firmware/host"), "-DTINYENGINE_ARENA=4096"]
needs_clang = pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang (apt-get install clang)")


def compiles(compiler: str, source: str, *options: str) -> None:
    command = [compiler, *LANGUAGE, "-fsyntax-only", *HOST, *options, str(TINYENGINE / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_clang
@pytest.mark.parametrize("kernels", ["-DTINYENGINE_SCALAR", "-march=icelake-server"])
@pytest.mark.parametrize("source", SOURCES)
def test_clang_has_nothing_to_say(source, kernels):
    """GCC compiles the same sources with the same warnings as errors wherever an image or the library is built."""
    compiles("clang++", source, kernels)


@needs_clang
def test_a_warning_would_be_heard(tmp_path):
    (tmp_path / "narrow.cpp").write_text("signed char f(int x) { return x; }\n")
    with pytest.raises(AssertionError, match="implicit conversion"):
        compiles("clang++", str(tmp_path / "narrow.cpp"))


@needs_clang
def test_a_short_fuzz_finds_nothing(tmp_path):
    """Loader and calls, from programs of little worlds; docs/edge.md has the long run."""
    source, image, corpus = TINYENGINE / "fuzz/world.cpp", tmp_path / "fuzz", tmp_path / "corpus"
    watch = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    build = ["clang++", "-std=c++17", "-O1", "-DTINYENGINE_SCALAR", *watch, str(source), "-o", str(image)]
    built = subprocess.run(build, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("needs libFuzzer (apt-get install libclang-rt-dev)")
    assert built.returncode == 0, built.stderr
    corpus.mkdir()
    write_corpus(corpus)
    options = ["-runs=600", "-max_len=60000", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([str(image), *options, str(corpus)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def write_corpus(folder: Path) -> None:
    """Write programs of little worlds, each with calls behind it: pictures, begin, steps, drawing, gauge, a plan."""
    calls = [
        bytes([32, 1, 2, 4, 3, 5, 6, 7] * 2),
        bytes(np.random.default_rng(0).integers(0, 256, 16).astype(np.uint8)),
    ]
    for projection, bits in (("none", 8), ("normalise", 4)):
        _, whole = little_worlds(projection, bits)
        for i, behind in enumerate(calls):
            program, _ = write_world(whole, decoder=i == 0)
            (folder / f"{projection}-{i}").write_bytes(program + behind)
