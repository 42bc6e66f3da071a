# What BentoML serves: POST /infer with the frame's bytes -> labels, then confidence, as bytes.
# Imported by BentoML alone, with the interpreter of its own environment.
import os

import bentoml
import numpy
import onnxruntime
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

path, threads, height, width = os.environ["ROADWORTHY_PEER"].split("|")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
options.inter_op_num_threads = 1
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
SHAPE = (1, int(height), int(width), 3)


async def infer(request: Request) -> Response:
    frame = numpy.frombuffer(await request.body(), numpy.uint8).reshape(SHAPE)
    maps = await run_in_threadpool(session.run, ["labels", "confidence"], {"frame": frame})
    return Response(b"".join(one.tobytes() for one in maps), media_type="application/octet-stream")


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
@bentoml.asgi_app(Starlette(routes=[Route("/infer", infer, methods=["POST"])]))
class Road:
    pass
