"""A world in integers: its encoder and decoder are chains, its predictor a GRU on int16.

Shape legend: b batch, h = w = image size, c context, d latent, a action, e hidden, n values in, o values out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int8, Int16, Int32, Int64, UInt8
from numpy.typing import NDArray

from worldline.core.errors import WorldlineError
from worldline.edge import integer
from worldline.edge.graph import Chain
from worldline.edge.integer import WideScaling


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """A matrix on int16 values."""

    weight: Int8[np.ndarray, "o n"]
    """Where `bits` is 4, multiples of 16."""
    bias: Int32[np.ndarray, " o"]
    by: WideScaling
    bits: int = 8
    """That a weight takes in a program: 8 or 4."""

    def __post_init__(self) -> None:
        if self.bits == 4 and (self.weight & 15).any():
            raise WorldlineError("weights of 4 bits are multiples of 16")
        if (self.by.shift < 15).any():
            raise WorldlineError("the factors of an int16 matrix must be below 1; widen its output's scale")

    def run(self, x: Int16[np.ndarray, "b n"]) -> Int64[np.ndarray, "b o"]:
        """Return scaled values, not saturated."""
        return integer.linear_wide(x, self.weight, self.bias, self.by)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """z' = z + change(relu(from_hidden(h') + from_input(x))), x = relu(embed(z, a)), h' = GRU(x, h)."""

    embed: Dense
    input_gates: Dense
    hidden_gates: Dense
    from_hidden: Dense
    from_input: Dense
    change: Dense
    radius: int = 0
    """Of the sphere that latents are put back onto, in their unit; 0: they are left where they are."""

    def run(
        self, z: Int16[np.ndarray, "b d"], action: Int16[np.ndarray, "b a"], h: Int16[np.ndarray, "b e"]
    ) -> tuple[Int16[np.ndarray, "b d"], Int16[np.ndarray, "b e"]]:
        x = _relu16(self.embed.run(np.concatenate((z, action), axis=1)))
        h = integer.gru(self.input_gates.run(x), self.hidden_gates.run(h), h)
        y = _relu16(self.from_hidden.run(h) + self.from_input.run(x))
        z = integer.saturate(z + self.change.run(y), 16).astype(np.int16)
        return (integer.normalise(z, self.radius) if self.radius else z), h


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """Latents to the decoder's first grid: relu(matrix), in int8."""

    matrix: Dense
    zero_out: int
    scale: float = 1.0
    """What a step of the output is worth; nothing is computed with it."""

    def run(self, z: Int16[np.ndarray, "b d"]) -> Int8[np.ndarray, "b o"]:
        return np.clip(self.matrix.run(z) + self.zero_out, self.zero_out, 127).astype(np.int8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gauge:
    """Where real latents are: in units of 1/1024 of their standard deviations."""

    mean: Int16[np.ndarray, " d"]
    whiten: Dense
    radius99: int

    def white(self, offset: Int64[np.ndarray, "b d"]) -> Int64[np.ndarray, "b d"]:
        return integer.saturate(self.whiten.run(integer.saturate(offset, 16).astype(np.int16)), 16)

    def region(self, z: Int16[np.ndarray, "b d"]) -> Int64[np.ndarray, " b"]:
        """Return how far latents are from the mean of real ones, in 1/256 of what 99% of these keep within."""
        squares = (self.white(z.astype(np.int64) - self.mean) ** 2).sum(axis=1)
        return np.array([integer.root(int(s)) * 256 // self.radius99 for s in squares], dtype=np.int64)

    def drift(self, z_hat: Int16[np.ndarray, "b d"], z: Int16[np.ndarray, "b d"]) -> Int64[np.ndarray, " b"]:
        """Return how far latents are apart, in 1/256 of the variance of real ones (mean over directions)."""
        squares = (self.white(z_hat.astype(np.int64) - z) ** 2).sum(axis=1)
        return squares // (z.shape[1] << 12)


class State(NamedTuple):
    """Everything that the next step depends on."""

    z: Int16[np.ndarray, "b d"]
    h: Int16[np.ndarray, "b e"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Normalising:
    """How native actions are normalised: clamped, then (value - mean) times factor, in float32, rounded half up."""

    low: Float32[np.ndarray, " a"]
    high: Float32[np.ndarray, " a"]
    mean: Float32[np.ndarray, " a"]
    factor: Float32[np.ndarray, " a"]

    def run(self, native: Float[np.ndarray, "*b a"]) -> Int16[np.ndarray, "*b a"]:
        """Return native actions as `step` takes them."""
        steps = (np.clip(native.astype(np.float32), self.low, self.high) - self.mean) * self.factor + np.float32(0.5)
        return integer.saturate(np.floor(steps).astype(np.int64), 16).astype(np.int16)

    def native(self, actions: Int16[np.ndarray, "*b a"]) -> Float32[np.ndarray, "*b a"]:
        """Return the way back, in the actions' own units."""
        values: NDArray[np.float32] = actions.astype(np.float32) / self.factor + self.mean
        return np.clip(values, self.low, self.high)


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerWorld:
    """The methods of a `World`, in integers: latents in `scale`, actions normalised and in `scale` too."""

    encoder: Chain
    predictor: Predictor
    drawing: Drawing
    decoder: Chain
    gauge: Gauge
    scale: float
    """Of latents and normalised actions."""
    actions: Normalising

    @property
    def hidden(self) -> int:
        return self.predictor.hidden_gates.weight.shape[1]

    @property
    def num_weights(self) -> int:
        """Weights of all parts, each a byte."""
        p = self.predictor
        matrices = (p.embed, p.input_gates, p.hidden_gates, p.from_hidden, p.from_input, p.change, self.drawing.matrix,
            self.gauge.whiten)  # fmt: skip
        return sum(m.weight.size for m in matrices) + _weights(self.encoder) + _weights(self.decoder)

    def encode(self, frames: UInt8[np.ndarray, "b h w 3"]) -> Int16[np.ndarray, "b d"]:
        """Encode pictures."""
        z = self.encoder.run((frames ^ 0x80).view(np.int8)).astype(np.int16)
        return integer.normalise(z, self.predictor.radius) if self.predictor.radius else z

    def begin(self, z: Int16[np.ndarray, "b c d"], actions: Int16[np.ndarray, "b cm1 a"]) -> State:
        """Return the state after `c` real latents and the c - 1 actions between them."""
        if z.shape[1] != actions.shape[1] + 1:
            raise WorldlineError(f"begin wants one action fewer than latents, got {actions.shape[1]} and {z.shape[1]}")
        state = State(z[:, 0], np.zeros((len(z), self.hidden), np.int16))
        for i in range(actions.shape[1]):
            state = State(z[:, i + 1], self.step(state, actions[:, i]).h)
        return state

    def step(self, state: State, action: Int16[np.ndarray, "b a"]) -> State:
        """Imagine one step."""
        return State(*self.predictor.run(state.z, action, state.h))

    def decode(self, z: Int16[np.ndarray, "b d"]) -> UInt8[np.ndarray, "b h w 3"]:
        """Draw latents."""
        grid = self.drawing.run(z).reshape(len(z), *self.decoder.stages[0].size_in)
        return self.decoder.run(grid).astype(np.uint8)


def _relu16(x: Int64[np.ndarray, "*b"]) -> Int16[np.ndarray, "*b"]:
    return np.clip(x, 0, 2**15 - 1).astype(np.int16)


def _weights(chain: Chain) -> int:
    matrix = getattr(chain.end, "matrix", None)
    affines = [a for stage in chain.stages for a in (stage.depthwise, stage.conv) if a is not None]
    return sum(a.weight.size for a in affines) + (0 if matrix is None else matrix.weight.size)
