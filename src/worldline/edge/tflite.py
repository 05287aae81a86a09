"""Read an int8 TFLite graph into a chain, so that its weights and scales can be measured here and there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from worldline.core.errors import WorldlineError
from worldline.edge.graph import Affine, Average, Chain, Rows, Size, Stage
from worldline.edge.integer import scaling


def read_chain(path: str | Path) -> Chain:
    """Return the chain of a graph of PAD, CONV_2D and DEPTHWISE_CONV_2D, depthwise ones fused with 1x1 ones behind.

    At its end may be AVERAGE_POOL_2D over the whole grid, QUANTIZE and FULLY_CONNECTED.

    Raises:
        WorldlineError: the file is not a TFLite model, or holds another operator.
    """
    try:
        from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema
    except ImportError:
        raise WorldlineError("reading TFLite models wants the schema: pip install --pre tflite-micro") from None
    data = Path(path).read_bytes()
    if data[4:8] != b"TFL3":
        raise WorldlineError(f"{path} is not a TFLite model")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    reader = _Reader(model)
    for operator in model.subgraphs[0].operators:
        operator.inputs, operator.outputs = ([int(i) for i in ends] for ends in (operator.inputs, operator.outputs))
        name = names[model.operatorCodes[operator.opcodeIndex].builtinCode]
        if not hasattr(reader, name.lower()):
            raise WorldlineError(f"{path}: {name} is not among the operators that a chain has")
        getattr(reader, name.lower())(operator)
    return reader.chain()


class _Reader:
    def __init__(self, model: Any) -> None:
        self.graph, self.buffers = model.subgraphs[0], model.buffers
        self.stages: list[Stage] = []
        self.padding = (0, 0)
        self.tail: dict[str, Any] = {}

    def chain(self) -> Chain:
        fused: list[Stage] = []
        for stage in self.stages:
            before = fused[-1] if fused else None
            if before is not None and before.kind == "depthwise" and stage.kind == "conv" and stage.kernel == 1:
                fused[-1] = replace(before, kind="separable", size=stage.size, conv=stage.conv)
            else:
                fused.append(stage)
        return Chain(stages=tuple(fused), end=Average(**self.tail) if self.tail else Rows())

    def pad(self, operator: Any) -> None:
        rows = self._data(operator.inputs[1], np.int32).reshape(-1, 2)
        self.padding = (int(rows[1][0]), int(rows[2][0]))

    def conv_2d(self, operator: Any) -> None:
        self._stage(operator, "conv")

    def depthwise_conv_2d(self, operator: Any) -> None:
        self._stage(operator, "depthwise")

    def average_pool_2d(self, operator: Any) -> None:
        self.tail["mean_zero_in"] = self._zero(operator.outputs[0])

    def quantize(self, operator: Any) -> None:
        source, to = operator.inputs[0], operator.outputs[0]
        self.tail["mean_by"] = scaling(self._scale(source) / self._scale(to))
        self.tail["mean_zero_out"] = self._zero(to)

    def fully_connected(self, operator: Any) -> None:
        self.tail["matrix"] = self._affine(operator, self._data(operator.inputs[1], np.int8))

    def _stage(self, operator: Any, kind: Literal["conv", "depthwise"]) -> None:
        options, (x, w, _) = operator.builtinOptions, operator.inputs
        weight = self._data(w, np.int8)
        kernel, stride, padding = int(weight.shape[1]), int(options.strideH), self.padding
        source, size = self._size(x), self._size(operator.outputs[0])
        if any(padding):  # the graph padded before
            source = self.stages[-1].size if self.stages else self._size(int(self.graph.inputs[0]))
        elif options.padding == 0:  # SAME
            top, left = (max(0, (out - 1) * stride + kernel - n) // 2 for out, n in zip(size, source[:2], strict=False))
            padding = (top, left)
        affine = self._affine(operator, weight[0] if kind == "depthwise" else weight)
        common = Stage(
            kind="max", size_in=source, size=size, kernel=kernel, stride=stride, padding=padding, zero_in=self._zero(x)
        )
        deep = kind == "depthwise"
        self.stages.append(
            replace(common, kind=kind, depthwise=affine if deep else None, conv=None if deep else affine)
        )
        self.padding = (0, 0)

    def _affine(self, operator: Any, weight: NDArray[np.int8]) -> Affine:
        x, w, b = operator.inputs
        out, options = operator.outputs[0], operator.builtinOptions
        scale, zero = self._scale(out), self._zero(out)
        low, high = -128, 127
        if options.fusedActivationFunction in (1, 3):  # ReLU, ReLU6
            low = max(low, zero)
        if options.fusedActivationFunction == 3:
            high = min(high, zero + int(np.floor(6.0 / scale[0] + 0.5)))
        return Affine(
            weight=weight, bias=self._data(b, np.int32), by=scaling(self._scale(x) * self._scale(w) / scale),
            zero_out=zero, low=low, high=high,
        )  # fmt: skip

    def _size(self, i: int) -> Size:
        rows, columns, channels = (int(n) for n in self.graph.tensors[i].shape[1:])
        return rows, columns, channels

    def _data(self, i: int, dtype: Any) -> NDArray[Any]:
        tensor = self.graph.tensors[i]
        return np.frombuffer(bytes(self.buffers[tensor.buffer].data), dtype=dtype).reshape(tensor.shape)

    def _scale(self, i: int) -> NDArray[np.float64]:
        return np.asarray(self.graph.tensors[i].quantization.scale, dtype=np.float64)

    def _zero(self, i: int) -> int:
        return int(self.graph.tensors[i].quantization.zeroPoint[0])
