"""One operator at a time in TensorFlow Lite Micro, by its wheel: an oracle that shares no code with ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
import pytest
from numpy.typing import NDArray

# the dev extra has it where there is a wheel
tflite_micro = pytest.importorskip("tflite_micro", reason="pip install --pre tflite-micro")
from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema  # noqa: E402

_TYPES = {np.dtype(np.int8): 9, np.dtype(np.int16): 7, np.dtype(np.int32): 2, np.dtype(np.int64): 4}


class Model:
    """A graph of one operator, built tensor by tensor."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.buffers = [schema.BufferT()]

    def tensor(
        self,
        shape: Sequence[int],
        dtype: Any,
        scale: Any,
        zero_point: int = 0,
        data: NDArray[Any] | None = None,
        axis: int = 0,
    ) -> int:
        tensor = schema.TensorT()
        tensor.name = f"t{len(self.tensors)}".encode()
        tensor.shape, tensor.type = list(shape), _TYPES[np.dtype(dtype)]
        quantization = schema.QuantizationParametersT()
        scales = np.atleast_1d(scale)
        quantization.scale, quantization.zeroPoint = scales.tolist(), [zero_point] * len(scales)
        quantization.quantizedDimension = axis
        tensor.quantization = quantization
        if data is not None:
            tensor.buffer = len(self.buffers)
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data, dtype=dtype).tobytes(), np.uint8)
            self.buffers.append(buffer)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def run(
        self, code: str, options: Any, inputs: Sequence[int], output: int, values: Sequence[NDArray[Any]]
    ) -> NDArray[Any]:
        """Run the operator; `values` are those of the inputs without data, in order."""
        model, graph, operator = schema.ModelT(), schema.SubGraphT(), schema.OperatorT()
        operator_code = schema.OperatorCodeT()
        operator_code.builtinCode = getattr(schema.BuiltinOperator, code)
        operator_code.deprecatedBuiltinCode = min(operator_code.builtinCode, 127)
        operator_code.version = 5
        operator.inputs, operator.outputs = list(inputs), [output]
        if options is not None:
            name = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType, operator.builtinOptions = getattr(schema.BuiltinOptions, name), options
        given = [i for i in inputs if self.tensors[i].buffer == 0]
        graph.tensors, graph.operators = self.tensors, [operator]
        graph.inputs, graph.outputs = given, [output]
        model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [operator_code], [graph], self.buffers
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        interpreter = tflite_micro.runtime.Interpreter.from_bytes(bytes(builder.Output()), arena_size=200_000)
        for i, value in enumerate(values):
            interpreter.set_input(value, i)
        interpreter.invoke()
        result: NDArray[Any] = interpreter.get_output(0)
        return result


def conv(
    x: NDArray[np.int8],
    weight: NDArray[np.int8],
    bias: NDArray[np.int32],
    sx: float,
    sw: Any,
    so: float,
    zx: int,
    zo: int,
    stride: int,
    depthwise: bool,
) -> NDArray[Any]:
    """Convolve without padding; depthwise weights are (k, k, c)."""
    m = Model()
    if depthwise:
        weight = weight[None]
    k = weight.shape[1]
    size = [(n - k) // stride + 1 for n in x.shape[1:3]]
    channels = weight.shape[3] if depthwise else weight.shape[0]
    i = m.tensor(x.shape, np.int8, sx, zx)
    w = m.tensor(weight.shape, np.int8, sw, 0, weight, axis=3 if depthwise else 0)
    b = m.tensor(bias.shape, np.int32, sx * np.asarray(sw), 0, bias)
    o = m.tensor([1, *size, channels], np.int8, so, zo)
    options = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
    options.padding, options.strideH, options.strideW = schema.Padding.VALID, stride, stride
    options.dilationHFactor = options.dilationWFactor = 1
    if depthwise:
        options.depthMultiplier = 1
    return m.run("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", options, [i, w, b], o, [x])


def linear(
    x: NDArray[Any], weight: NDArray[np.int8], bias: NDArray[Any], sx: float, sw: Any, so: float, zx: int, zo: int
) -> NDArray[Any]:
    """Apply a matrix to int8 or int16 values."""
    m = Model()
    wide = x.dtype == np.int16
    i = m.tensor(x.shape, x.dtype, sx, zx)
    w = m.tensor(weight.shape, np.int8, sw, 0, weight)
    b = m.tensor(bias.shape, np.int64 if wide else np.int32, sx * np.asarray(sw), 0, bias)
    o = m.tensor([len(x), len(weight)], x.dtype, so, zo)
    return m.run("FULLY_CONNECTED", schema.FullyConnectedOptionsT(), [i, w, b], o, [x])


def pool(x: NDArray[np.int8], kind: str, kernel: int, stride: int) -> NDArray[Any]:
    m = Model()
    size = [(n - kernel) // stride + 1 for n in x.shape[1:3]]
    i, o = m.tensor(x.shape, np.int8, 1.0), m.tensor([1, *size, x.shape[3]], np.int8, 1.0)
    options = schema.Pool2DOptionsT()
    options.padding, options.strideH, options.strideW = schema.Padding.VALID, stride, stride
    options.filterHeight = options.filterWidth = kernel
    return m.run("AVERAGE_POOL_2D" if kind == "average" else "MAX_POOL_2D", options, [i], o, [x])


def requantise(x: NDArray[np.int8], sx: float, so: float, zx: int, zo: int) -> NDArray[Any]:
    m = Model()
    i, o = m.tensor(x.shape, np.int8, sx, zx), m.tensor(x.shape, np.int8, so, zo)
    return m.run("QUANTIZE", schema.QuantizeOptionsT(), [i], o, [x])
