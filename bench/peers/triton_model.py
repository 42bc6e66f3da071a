# What Triton's python backend runs: the version's model.onnx in ONNX Runtime, one thread, no spinning.
# Copied into each version directory;
# imported by Triton alone, with the interpreter of its own environment.
import json
import os
from typing import Any

import numpy
import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = os.path.join(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("ROADWORTHY_THREADS", "1"))
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = os.path.join(folder, "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [one.name for one in self.session.get_inputs()]
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.declared = {one["name"] for one in json.loads(args["model_config"])["output"]}

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            feed = {name: utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            wanted = [name for name in request.requested_output_names() if name in self.declared]
            for name, value in feed.items():
                if value.dtype == object:
                    text = [one.decode() if isinstance(one, bytes) else one for one in value.ravel()]
                    feed[name] = numpy.array(text, dtype=object).reshape(value.shape)
            results = self.session.run(wanted, feed)
            tensors = []
            for name, value in zip(wanted, results, strict=True):
                if value.dtype == object:
                    value = numpy.array([one.encode() for one in value.ravel()], dtype=object).reshape(
                        value.shape
                    )
                tensors.append(utils.Tensor(name, value))
            responses.append(utils.InferenceResponse(output_tensors=tensors))
        return responses
