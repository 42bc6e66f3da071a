"""Our stubs beside the others' in one process: each of them registers package `inference` in protobuf's
default pool, and each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bench.peers import environments

pytestmark = pytest.mark.peers
ROOT = Path(__file__).resolve().parents[2]
THEIRS = {
    "kserve": "kserve.protocol.grpc.grpc_predict_v2_pb2",
    "mlserver": "mlserver.grpc.dataplane_pb2",
    "triton": "tritonclient.grpc.service_pb2",
}
CODE = """
import importlib, sys
first, second = sys.argv[1:]
one, two = importlib.import_module(first), importlib.import_module(second)
for module in (one, two):
    request = module.ModelInferRequest(model_name="road", id="7", raw_input_contents=[b"x"])
    copy = (two if module is one else one).ModelInferRequest.FromString(request.SerializeToString())
    assert copy.model_name == "road" and copy.id == "7" and copy.raw_input_contents[0] == b"x"
"""


@pytest.mark.parametrize("name", list(THEIRS))
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "theirs first"])
def test_both_stubs_in_one_process(name: str, ours_first: bool) -> None:
    try:
        environment = environments.find(name)
    except environments.Absent as absent:
        pytest.skip(str(absent))
    modules = ["protos.inference_pb2", THEIRS[name]]
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", CODE, *(modules if ours_first else modules[::-1])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
