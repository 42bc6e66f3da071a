# What the KServe SDK's model server runs: one model.onnx in ONNX Runtime, one thread, no spinning.
# Started as a program with the interpreter of its own environment.
import json
import os

import numpy
import onnxruntime
from kserve import InferOutput, InferResponse, Model, ModelServer


class OnnxModel(Model):  # type: ignore[misc]
    def __init__(self, name: str, path: str, threads: int) -> None:
        super().__init__(name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):  # type: ignore[no-untyped-def]
        names = [one.name for one in payload.request_outputs or []] or ["labels", "confidence"]
        results = self.session.run(names, {"frame": payload.inputs[0].as_numpy()})
        outputs = []
        for name, value in zip(names, results, strict=True):
            output = InferOutput(name, list(value.shape), "UINT8")
            output.set_data_from_numpy(numpy.ascontiguousarray(value), binary_data=True)
            outputs.append(output)
        return InferResponse(payload.id or "", self.name, outputs, use_binary_outputs=True)


if __name__ == "__main__":
    # Through the environment: ModelServer reads the command line itself.
    options = json.loads(os.environ["ROADWORTHY_PEER"])
    ModelServer(
        http_port=options["http"],
        grpc_port=options["grpc"],
        workers=1,
        enable_docs_url=False,
        enable_latency_logging=False,  # a line for each request
    ).start([OnnxModel(options["name"], options["onnx"], options["threads"])])
