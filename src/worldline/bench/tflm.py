"""A chain as a TFLite graph, and the arena that TensorFlow Lite Micro wants for it, found by its own allocator."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldline.core.errors import WorldlineError
from worldline.edge.graph import Affine, Average, Chain, Flatten, Stage

_INT8, _INT32 = 9, 2
_SAME, _VALID = 0, 1
_VERSIONS = {
    "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "AVERAGE_POOL_2D": 2, "PAD": 2, "RESHAPE": 1,
    "RESIZE_NEAREST_NEIGHBOR": 2,
}  # fmt: skip
"""Of each operator, the one that brought int8."""


def arena_bytes(chain: Chain, pads: bool) -> int:
    """Return the smallest arena that the `tflite-micro` wheel runs a chain in.

    With `pads`, each padded convolution with a stride has a PAD of its own before it, as converters from PyTorch leave
    them; without, convolutions pad by themselves, on the sides that TFLite chooses: other values, the same sizes.

    Raises:
        WorldlineError: the wheel is missing, or 16 MiB are too few.
    """
    try:
        from tflite_micro import runtime
    except ImportError:
        raise WorldlineError("TFLM's arena wants its wheel: pip install --pre tflite-micro") from None
    model = graph_of(chain, pads)

    def fits(size: int) -> bool:
        try:
            with _quiet():
                runtime.Interpreter.from_bytes(model, arena_size=size)
        except RuntimeError:
            return False
        return True

    low, high = 0, 16 << 20
    if not fits(high):
        raise WorldlineError(f"TFLM has no room for this graph in {high:,} bytes")
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def graph_of(chain: Chain, pads: bool) -> bytes:
    """Return a chain as a TFLite model; factors and biases are only about right, sizes exactly."""
    graph = _Graph()
    at = graph.tensor((1, *chain.stages[0].size_in))
    first = at
    for stage in chain.stages:
        at = _stage(graph, stage, at, pads)
    end, size = chain.end, chain.stages[-1].size
    if isinstance(end, (Flatten, Average)):
        if isinstance(end, Average):
            options = graph.schema.Pool2DOptionsT()
            options.padding, options.strideH, options.strideW = _VALID, 1, 1
            options.filterHeight, options.filterWidth = size[0], size[1]
            at = graph.operator("AVERAGE_POOL_2D", options, [at], (1, 1, 1, size[2]))
        flat = end.matrix.weight.shape[1]
        shape = graph.constant(np.array([1, flat], np.int32))
        options = graph.schema.ReshapeOptionsT()
        options.newShape = [1, flat]
        at = graph.operator("RESHAPE", options, [at, shape], (1, flat))
        options = graph.schema.FullyConnectedOptionsT()
        inputs = [at, graph.weights(end.matrix.weight, 0), graph.bias(end.matrix)]
        at = graph.operator("FULLY_CONNECTED", options, inputs, (1, len(end.matrix.weight)))
    return graph.finish(first, at)


def _stage(graph: _Graph, stage: Stage, at: int, pads: bool) -> int:
    schema, (rows, columns, channels) = graph.schema, stage.size_in
    if stage.upsample:
        options = schema.ResizeNearestNeighborOptionsT()
        sizes = graph.constant(np.array([2 * rows, 2 * columns], np.int32))
        at = graph.operator("RESIZE_NEAREST_NEIGHBOR", options, [at, sizes], (1, 2 * rows, 2 * columns, channels))
        rows, columns = 2 * rows, 2 * columns
    padding = _SAME
    if pads and any(stage.padding) and stage.stride > 1:  # else TFLite's own padding is the same
        sides = [[0, 0], [stage.padding[0]] * 2, [stage.padding[1]] * 2, [0, 0]]
        shape = (1, rows + sum(sides[1]), columns + sum(sides[2]), channels)
        at = graph.operator("PAD", schema.PadOptionsT(), [at, graph.constant(np.array(sides, np.int32))], shape)
        padding = _VALID
    size = (1, *stage.size[:2])
    if stage.depthwise is not None:
        options = schema.DepthwiseConv2DOptionsT()
        options.depthMultiplier = 1
        weight = graph.weights(stage.depthwise.weight[None], 3)
        inputs = [at, weight, graph.bias(stage.depthwise)]
        at = graph.operator(
            "DEPTHWISE_CONV_2D", _convolution(options, stage.stride, padding), inputs, (*size, channels)
        )
        padding = _SAME
    if stage.conv is not None:
        stride = 1 if stage.depthwise is not None else stage.stride
        options = _convolution(schema.Conv2DOptionsT(), stride, padding)
        inputs = [at, graph.weights(stage.conv.weight, 0), graph.bias(stage.conv)]
        at = graph.operator("CONV_2D", options, inputs, (*size, stage.size[2]))
    return at


def _convolution(options: Any, stride: int, padding: int) -> Any:
    options.padding, options.strideH, options.strideW = padding, stride, stride
    options.dilationHFactor = options.dilationWFactor = 1
    return options


class _Graph:
    def __init__(self) -> None:
        from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema

        self.schema: Any = schema
        self.buffers: list[Any] = [schema.BufferT()]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[str] = []

    def tensor(self, shape: Sequence[int], kind: int = _INT8, scales: int = 1, axis: int = 0) -> int:
        tensor, quantization = self.schema.TensorT(), self.schema.QuantizationParametersT()
        tensor.name, tensor.shape, tensor.type = f"t{len(self.tensors)}".encode(), list(map(int, shape)), kind
        # of weights and biases 1/256, so that every factor is below 1
        quantization.scale = [1.0 if scales == 1 else 1 / 256] * scales
        quantization.zeroPoint, quantization.quantizedDimension = [0] * scales, axis
        tensor.quantization = quantization
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, values: NDArray[Any], scales: int = 1, axis: int = 0) -> int:
        at = self.tensor(values.shape, _INT32 if values.dtype == np.int32 else _INT8, scales, axis)
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        self.tensors[at].buffer = len(self.buffers)
        self.buffers.append(buffer)
        return at

    def weights(self, weight: NDArray[np.int8], axis: int) -> int:
        return self.constant(weight, weight.shape[axis], axis)

    def bias(self, affine: Affine) -> int:
        return self.constant(affine.bias.astype(np.int32), len(affine.bias))

    def operator(self, name: str, options: Any, inputs: list[int], shape: Sequence[int]) -> int:
        schema, operator, out = self.schema, self.schema.OperatorT(), self.tensor(shape)
        if name not in self.codes:
            self.codes.append(name)
        operator.opcodeIndex, operator.inputs, operator.outputs = self.codes.index(name), inputs, [out]
        kind = type(options).__name__.removesuffix("T")
        operator.builtinOptionsType, operator.builtinOptions = getattr(schema.BuiltinOptions, kind), options
        self.operators.append(operator)
        return out

    def finish(self, first: int, last: int) -> bytes:
        import flatbuffers

        schema = self.schema
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = self.tensors, self.operators, [first], [last]
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], self.buffers, []
        for name in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, name)
            code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), _VERSIONS[name]
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the wheel's complaints about a small arena, which come from C++, off the terminal."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
