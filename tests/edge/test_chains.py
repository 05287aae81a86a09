"""Chains of stages give the reference's bytes: on this machine, and on every Cortex-M that QEMU has."""

from __future__ import annotations

import shutil
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_chains import random_chain

import worldline.bench
from worldline.edge import cases
from worldline.edge.build import BOARDS
from worldline.edge.graph import Chain, Pixels, Rows
from worldline.edge.program import HEADER
from worldline.edge.schedule import Plan, plan_rows, plan_tiles
from worldline.edge.tflite import read_chain

DS96 = Path(worldline.bench.__file__).parent / "graphs/ds96_int8.tflite"
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ (apt-get install g++)")


def random_cases(seed: int, count: int, channels: int = 20) -> list[tuple[Chain, np.ndarray, Plan]]:
    """Return chains with a picture and a plan each: streamed, layer by layer, or in tiles of any size."""
    rng = np.random.default_rng(seed)

    def pick(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    chosen = []
    for _ in range(count):
        chain, picture = random_chain(pick, channels)
        tile = (pick(1, 8), pick(1, 8))
        plan = plan_rows(chain) if pick(0, 1) else plan_tiles(chain, pick(0, len(chain.stages) - 1), tile)
        chosen.append((chain, picture, plan))
    return chosen


def last_byte(chain: Chain, plan: Plan) -> int:
    """Return where a plan's last buffer ends, without what rounds it up."""
    _, columns, channels = chain.stages[-1].size
    if isinstance(chain.end, Rows):
        return plan.piece + columns * channels
    return plan.piece + 4 * -(-columns * channels // 4) + 6 * columns if isinstance(chain.end, Pixels) else plan.end


def assert_equal(target, image, chosen) -> None:
    outcomes = cases.run_cases(target, image, [cases.case_of(*case) for case in chosen])
    for i, ((chain, picture, plan), outcome) in enumerate(zip(chosen, outcomes, strict=True)):
        kinds = [(s.kind, s.size_in, s.size, s.kernel, s.stride, s.padding, s.upsample) for s in chain.stages]
        assert outcome.status == "ok", f"case {i}: {outcome.status} for {kinds}"
        got, want = cases.values_of(chain, outcome.result), chain.run(picture)[0]
        assert outcome.arena_end == last_byte(chain, plan), f"case {i}: not what {plan} says"
        np.testing.assert_array_equal(got, want, err_msg=f"case {i}: {kinds}, {type(chain.end).__name__}, {plan}")


@needs_compiler
@pytest.mark.parametrize(("options", "count"), [((), 2000), (("-DTINYENGINE_SCALAR",), 400)], ids=["native", "scalar"])
def test_random_chains_give_the_references_bytes(tmp_path, options, count):
    assert_equal(None, cases.compile_cases(None, tmp_path, options), random_cases(len(options), count))


@needs_compiler
@pytest.mark.parametrize("options", [(), ("-DTINYENGINE_SCALAR",)], ids=["native", "scalar"])
def test_hostile_programs_are_refused_or_harmless(tmp_path, options):
    """Words of a program are changed and its checksum put right; sanitisers watch for a step outside."""
    watch = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", *options)
    image = cases.compile_cases(None, tmp_path, watch)
    rng = np.random.default_rng(4)
    hostile = []
    for chosen in random_cases(5, 150, 12):
        case = cases.case_of(*chosen)
        for _ in range(8):
            program = bytearray(case.program)
            word = 4 * int(rng.integers(HEADER.size // 4, len(program) // 4))
            if rng.random() < 0.8:  # records, which lie at the end, hold all sizes and places
                word = len(program) - 4 * int(rng.integers(1, min(140, len(program) // 4 - HEADER.size // 4)))
            value = rng.choice([0, 1, 2, 7, 255, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1, rng.integers(2**32)])
            program[word : word + 4] = int(value).to_bytes(4, "little")
            program[16:20] = zlib.crc32(program[HEADER.size :]).to_bytes(4, "little")
            hostile.append(replace(case, program=bytes(program)))
    found = Counter(outcome.status for outcome in cases.run_cases(None, image, hostile))
    assert set(found) <= {"ok", "bad_program", "bad_argument"}
    assert found["bad_program"] > 300
    assert found["ok"] > 100


@pytest.mark.cortex
@pytest.mark.parametrize(
    ("board", "options"),
    [("m4", ()), ("m4", ("-DTINYENGINE_SCALAR",)), ("m7", ()), ("m33", ()), ("m55", ()), ("stm32f405", ())],
    ids=["m4", "m4-scalar", "m7", "m33", "m55", "stm32f405"],
)
def test_random_chains_give_the_same_bytes_on_a_board(tmp_path, board, options):
    image = cases.compile_cases(BOARDS[board], tmp_path, options)
    chosen = [c for c in random_cases(1, 150, 20) if len(cases.case_of(*c).program) < 20_000]
    assert len(chosen) > 100
    assert_equal(BOARDS[board], image, chosen)


@needs_compiler
def test_a_changed_bit_is_noticed(tmp_path):
    image = cases.compile_cases(None, tmp_path)
    chain, picture, plan = random_cases(2, 1)[0]
    case = cases.case_of(chain, picture, plan)
    damaged = bytearray(case.program)
    damaged[len(damaged) // 2] ^= 1
    (outcome,) = cases.run_cases(None, image, [replace(case, program=bytes(damaged))])
    assert outcome.status == "damaged"
    other = (chain.stages[0].conv or chain.stages[0].depthwise).weight
    other[...] ^= 1  # of the reference, not of the program
    (outcome,) = cases.run_cases(None, image, [case])
    assert (cases.values_of(chain, outcome.result) != chain.run(picture)[0]).any()


@pytest.mark.cortex
@pytest.mark.parametrize(("board", "most"), [("m4", 14.0e6), ("m55", 5.0e6)])
def test_the_reference_graph_keeps_to_its_budget(tmp_path, board, most):
    """DS96: TensorFlow Lite Micro's bytes, in fewer instructions, and 15 KB with the stack, a tenth of its arena."""
    chain = read_chain(DS96)
    pictures = np.random.default_rng(3).integers(-128, 128, (2, 1, 96, 96, 3)).astype(np.int8)
    target = BOARDS[board]
    chosen = [cases.case_of(chain, picture) for picture in pictures]
    for picture, outcome in zip(
        pictures, cases.run_cases(target, cases.compile_cases(target, tmp_path), chosen), strict=True
    ):
        np.testing.assert_array_equal(cases.values_of(chain, outcome.result), chain.run(picture)[0])
        assert outcome.ticks * target.instructions_per_tick < most
        assert outcome.arena_end == chosen[0].arena_bytes  # painted, and planned
        assert outcome.arena_end + outcome.stack_bytes <= 15 * 1024
