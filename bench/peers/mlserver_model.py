# What MLServer runs: the model.onnx that its settings name, in ONNX Runtime, one thread, no spinning.
# There is no mlserver-onnx package.  Copied into the model's folder; imported by MLServer alone.
import numpy
import onnxruntime
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class OnnxModel(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(self.settings.parameters.extra["threads"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self.settings.parameters.uri
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.shape = [1, *self.session.get_inputs()[0].shape[1:]]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = payload.inputs[0]
        text = given.datatype == "BYTES"
        data = given.data.root if hasattr(given.data, "root") else given.data
        if text:
            content = data[0] if isinstance(data, list) else data
            frame = numpy.frombuffer(content, numpy.uint8).reshape(self.shape)
        else:
            frame = numpy.array(data, numpy.uint8).reshape(given.shape)
        names = [one.name for one in payload.outputs or []] or ["labels", "confidence"]
        results = self.session.run(names, {"frame": frame})
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[
                ResponseOutput(name=name, shape=[1], datatype="BYTES", data=[value.tobytes()])
                if text
                else ResponseOutput(
                    name=name, shape=list(value.shape), datatype="UINT8", data=value.ravel().tolist()
                )
                for name, value in zip(names, results, strict=True)
            ],
        )
