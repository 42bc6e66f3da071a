"""A repository that export.build wrote, unmodified, in a real Triton Inference Server.

The tritonserver of nvidia-pytriton has no ONNX Runtime backend, only a python one.  A backend of that name
made from it (Triton's "python-based backend") stands in: it runs each version's model.onnx, so that
everything but the kernels is Triton's: the layout, config.pbtxt, versions, batching, the wire.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from bench.peers import environments, triton
from export.build import Options, build
from export.publish import publish_onnx
from runtime.repository.repository import Repository
from tests.export.conftest import street_like

pytestmark = pytest.mark.peers
grpc = pytest.importorskip("tritonclient.grpc")


@pytest.fixture(scope="module")
def repository(pack, tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "repo"
    build(pack, path, model="open")
    build(pack, path, model="open", options=Options(opset=17))
    build(pack, path, model="fixed", options=Options(batch=2))
    # What a running server of ours leaves beside the versions must not disturb Triton either.
    Repository(path).set_live("open", {"live": 1})
    Repository(path).append_history("open", {"version": 1, "state": "LIVE"})
    publish_onnx(path / "fixed" / "1" / "model.onnx", path, "alien", labels=list(pack.spec.classes))
    return path


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    try:
        home = environments.site_packages(environments.find("triton")) / "pytriton" / "tritonserver"
    except environments.Absent as error:
        pytest.skip(str(error))
    # Copies: a python-based backend may not lead to files outside the backend folder.
    shutil.copytree(home / "backends" / "python", work / "backends" / "python")
    stub = home / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(stub / "triton_python_backend_stub", work / "backends" / "python")
    (work / "backends" / "onnxruntime").mkdir()
    runner = Path(triton.__file__).with_name("triton_model.py")
    shutil.copy(runner, work / "backends" / "onnxruntime" / "model.py")
    with triton.start(repository, work=work, models=("open", "fixed", "alien")) as one:
        yield one


@pytest.fixture
def client(server):
    with grpc.InferenceServerClient(server.target) as one:
        yield one


def ask(client, model, frames):
    tensor = grpc.InferInput("frame", list(frames.shape), "UINT8")
    tensor.set_data_from_numpy(frames)
    return client.infer(model, [tensor])


@pytest.mark.parametrize("model", ["open", "fixed", "alien"])
def test_triton_loads_it_and_answers_what_onnx_runtime_answers(client, repository, model):
    frames = street_like(2)
    answer = ask(client, model, frames)
    version = answer.get_response().model_version
    assert version == ("2" if model == "open" else "1")
    session = ort.InferenceSession(
        repository / model / version / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    for name, wanted in zip(names, session.run(names, {"frame": frames}), strict=True):
        assert np.allclose(answer.as_numpy(name), wanted, atol=1e-5)


def test_triton_shows_the_batch_we_declared(client):
    config = client.get_model_config("open", as_json=True)["config"]
    assert config["max_batch_size"] == 8
    assert config["input"][0]["dims"] == ["64", "96", "3"]
    assert "max_batch_size" not in client.get_model_config("fixed", as_json=True)["config"]
