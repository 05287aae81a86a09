"""The integer operators against TensorFlow Lite Micro, case by case at random, and against real arithmetic."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest

from worldline.core.errors import WorldlineError
from worldline.edge import integer

CASES = 120


def _scale(rng: np.random.Generator, low: float, high: float, count: int = 1) -> np.ndarray:
    """Return scales as a model file keeps them, in float32."""
    return rng.uniform(low, high, count).astype(np.float32).astype(np.float64)


def _zeros(rng: np.random.Generator, count: int) -> list[int]:
    return [int(v) for v in rng.integers(-128, 128, count)]


@pytest.mark.parametrize("depthwise", [False, True])
def test_convolutions_equal_tensorflow_lite_micro(depthwise):
    rng = np.random.default_rng(int(depthwise))
    for _ in range(CASES):
        k, stride, c, o = (int(v) for v in rng.integers([1, 1, 1, 1], [4, 3, 9, 9]))
        x = rng.integers(-128, 128, (1, *rng.integers(k, 9, 2), c), dtype=np.int8)
        o = c if depthwise else o
        weight = rng.integers(-127, 128, (k, k, c) if depthwise else (o, k, k, c), dtype=np.int8)
        bias, (zero_in, zero_out) = rng.integers(-20000, 20000, o, dtype=np.int32), _zeros(rng, 2)
        sx, sw = _scale(rng, 0.001, 0.1), _scale(rng, 0.001, 0.02, o)
        so = _scale(rng, 1, 40) * sx * sw.max() * k * math.sqrt(c)
        so = so.astype(np.float32).astype(np.float64)
        want = oracle.conv(x, weight, bias, sx[0], sw, so[0], zero_in, zero_out, stride, depthwise)
        operator = integer.depthwise if depthwise else integer.conv2d
        got = operator(
            x, weight, bias, integer.scaling(sx * sw / so), stride=stride, padding=(0, 0), size=want.shape[1:3],
            zero_in=zero_in, zero_out=zero_out,
        )  # fmt: skip
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("wide", [False, True])
def test_matrices_equal_tensorflow_lite_micro(wide):
    rng = np.random.default_rng(2 + wide)
    for _ in range(CASES):
        n, o, b = (int(v) for v in rng.integers(1, 70, 3))
        bias, (zero_in, zero_out) = rng.integers(-20000, 20000, o), _zeros(rng, 2)
        sx, sw = _scale(rng, 0.001, 0.1), _scale(rng, 0.001, 0.02, o)
        so = (sx * sw.max() * math.sqrt(n) * rng.uniform(0.3 if wide else 3, 60)).astype(np.float32).astype(np.float64)
        if wide:
            x = rng.integers(-(2**15), 2**15, (b, n), dtype=np.int16)
            weight = rng.integers(-40, 41, (o, n), dtype=np.int8)
            want = oracle.linear(x, weight, bias, sx[0], sw, so[0], 0, 0)
            got = integer.linear_wide(x, weight, bias.astype(np.int32), integer.wide_scaling(sx * sw / so))
            got = integer.saturate(got, 16)
        else:
            x = rng.integers(-128, 128, (b, n), dtype=np.int8)
            weight = rng.integers(-127, 128, (o, n), dtype=np.int8)
            bias = bias.astype(np.int32)
            want = oracle.linear(x, weight, bias, sx[0], sw, so[0], zero_in, zero_out)
            got = integer.linear(x, weight, bias, integer.scaling(sx * sw / so), zero_in=zero_in, zero_out=zero_out)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["average", "max"])
def test_pools_equal_tensorflow_lite_micro(kind):
    rng = np.random.default_rng(4)
    for _ in range(CASES):
        kernel, stride = (int(v) for v in rng.integers(1, 4, 2))
        x = rng.integers(-128, 128, (1, *rng.integers(3, 12, 2), rng.integers(1, 9)), dtype=np.int8)
        want = oracle.pool(x, kind, kernel, stride)
        got = integer.pool(x, kind, kernel=kernel, stride=stride, size=want.shape[1:3])
        np.testing.assert_array_equal(got, want)


def test_scales_equal_tensorflow_lite_micro():
    rng = np.random.default_rng(5)
    for _ in range(CASES):
        x = rng.integers(-128, 128, (1, 5, 5, 3), dtype=np.int8)
        scale, (zero_in, zero_out) = float(_scale(rng, 0.001, 0.1)[0]), _zeros(rng, 2)
        to = float(np.float32(scale * rng.uniform(0.2, 4)))
        want = oracle.requantise(x, scale, to, zero_in, zero_out)
        by = integer.scaling(np.array([scale / to]))
        np.testing.assert_array_equal(integer.requantise_values(x, by, zero_in=zero_in, zero_out=zero_out), want)


def test_an_accumulator_that_could_overflow_is_refused():
    x = np.full((1, 70000), 127, np.int8)
    with pytest.raises(WorldlineError, match=r"2\^30"):
        integer.dot(x, x)


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_tables_follow_their_functions(function):
    x = np.arange(-(2**15), 2**15).astype(np.int16)
    real = np.tanh(x / 4096) if function == "tanh" else 1 / (1 + np.exp(x / -4096))
    got = integer.lookup(x, integer.table(function)) / 32768
    assert np.abs(got - real).max() < 1.2e-4  # a chord of 1/32 of tanh is off by 9.4e-5, and values end in 1/32768
    assert (np.diff(got) >= 0).all()


def test_gru_follows_the_real_one():
    rng = np.random.default_rng(6)
    gates_x, gates_h = rng.normal(0, 6000, (2, 500, 12)).round().astype(np.int64)
    h = rng.integers(-(2**15), 2**15, (500, 4)).astype(np.int16)
    (xr, xu, xn), (hr, hu, hn) = (np.split(g / 4096, 3, axis=1) for g in (gates_x, gates_h))
    r, u = 1 / (1 + np.exp(-(xr + hr))), 1 / (1 + np.exp(-(xu + hu)))
    n = np.tanh(xn + r * np.clip(hn, -8, 8))
    want = n + u * (h / 32768 - n)
    assert np.abs(integer.gru(gates_x, gates_h, h) / 32768 - want).max() < 1e-3


def test_normalised_latents_lie_on_the_sphere():
    rng = np.random.default_rng(7)
    z = rng.normal(0, 5000, (200, 32)).round().clip(-32768, 32767).astype(np.int16)
    z[0] = 0
    got = integer.normalise(z, 20000)
    want = z[1:] * (20000 / np.linalg.norm(z[1:].astype(np.float64), axis=1, keepdims=True))
    assert (got[0] == 0).all()
    assert np.abs(got[1:] - want).max() <= 0.51
