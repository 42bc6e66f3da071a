"""A graph in ONNX Runtime on the CPU while it is being made: no engine yet, nothing to publish.

Knows ONNX Runtime; nothing of packs, precisions or versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from common.text import shorten
from export.errors import ExportError


class Runner:
    """One loaded graph under the graph contract.  Raises ExportError if ONNX Runtime refuses it.

    `optimise` False: sooner ready, for a graph that is asked once or twice.
    """

    def __init__(self, model: onnx.ModelProto, threads: int = 1, *, optimise: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what it says it also raises
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library raises its own, undocumented classes
            raise ExportError(f"ONNX Runtime refuses the graph: {shorten(error, 200)}") from error
        self._input = model.graph.input[0].name
        self._batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1

    def run(self, frames: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """The named outputs for uint8 [n,H,W,3], one frame at a time: a fixed batch is filled with the same.

        Raises: ExportError where the graph fails, of too little memory for one.
        """
        try:
            parts = [
                self._session.run(list(names), {self._input: np.repeat(f[None], self._batch, axis=0)})
                for f in frames
            ]
        except Exception as error:
            raise ExportError(f"the graph does not run in ONNX Runtime: {shorten(error, 200)}") from error
        return {name: np.stack([part[i][0] for part in parts]) for i, name in enumerate(names)}
