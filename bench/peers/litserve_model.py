# What LitServe runs: POST /predict with the frame as a file -> labels, then confidence, as bytes.
# Started as a program with the interpreter of its own environment.
import os

import litserve
import numpy
import onnxruntime
from starlette.responses import Response

path, threads, height, width, port = os.environ["ROADWORTHY_PEER"].split("|")
SHAPE = (1, int(height), int(width), 3)


class Road(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device):  # type: ignore[no-untyped-def]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return numpy.frombuffer(request["request"].file.read(), numpy.uint8).reshape(SHAPE)

    def predict(self, frame):  # type: ignore[no-untyped-def]
        return self.session.run(["labels", "confidence"], {"frame": frame})

    def encode_response(self, maps):  # type: ignore[no-untyped-def]
        content = b"".join(one.tobytes() for one in maps)
        return Response(content, media_type="application/octet-stream")


if __name__ == "__main__":
    litserve.LitServer(Road(), accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning"
    )
