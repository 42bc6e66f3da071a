"""Ask a server every call of `bench.peers.calls`, and keep what it answers.

The list goes to the real tritonserver once (`python -m bench.peers.probe --record FILE`), and its answers
are kept as a fixture; the tests send the same list to our server and compare.  An answer is a dictionary
{"code", "message", "response"}; `normal` removes from it what cannot be equal (times, keys, names).
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb

from bench.peers.calls import SERVICE, Call, Context, calls, models


def ask(channel: grpc.Channel, call: Call, context: Context, timeout: float = 20.0) -> dict[str, Any]:
    """Makes one call; returns {"code", "message", "response"[, "shm"]}; `response` as protobuf's JSON."""
    request = call.request(context)
    path = call.rpc if call.rpc.startswith("/") else f"/{SERVICE}/{call.rpc}"
    kind = _RESPONSES.get(call.rpc)
    answer: dict[str, Any] = {"code": "OK", "message": "", "response": None}
    try:
        if isinstance(request, list):
            stream = channel.stream_stream(path)(iter([_wire(one) for one in request]), timeout=timeout)
            answer["response"] = []
            for one in stream:
                answer["response"].append(_parsed(kind, one))
        else:
            answer["response"] = _parsed(kind, channel.unary_unary(path)(_wire(request), timeout=timeout))
    except grpc.RpcError as error:
        answer["code"] = error.code().name
        answer["message"] = error.details() or ""
    if call.shm is not None and answer["code"] == "OK":
        offset, size = call.shm
        region = context.view("out")
        answer["shm"] = base64.b64encode(bytes(region[offset : offset + size])).decode()
        region[offset : offset + size] = bytes(size)
    without: dict[str, Any] = json.loads(_without_keys(json.dumps(answer), context))
    return without


def run(
    target: str, *, only: Callable[[Call], bool] = lambda _call: True
) -> Iterator[tuple[Call, dict[str, Any]]]:
    """Makes all calls in order against a server; yields each with its answer."""
    context = Context()
    options = [("grpc.max_receive_message_length", -1)]
    try:
        with grpc.insecure_channel(target, options) as channel:
            for call in calls():
                if only(call):
                    yield call, _settled(channel, call, context)
    finally:
        context.close()


def _settled(channel: grpc.Channel, call: Call, context: Context) -> dict[str, Any]:
    until = time.monotonic() + 60
    while True:
        answer = ask(channel, call, context)
        if not call.until_gone or call.until_gone not in json.dumps(answer) or time.monotonic() > until:
            return answer
        time.sleep(0.2)


def asked(target: str) -> dict[str, dict[str, Any]]:
    """All calls' normal answers, by name of the call."""
    return {call.name: {"rpc": call.rpc, **normal(call, answer)} for call, answer in run(target)}


_RESPONSES = {
    name: getattr(pb, f"{name}Response")
    for name in (
        "ServerLive",
        "ServerReady",
        "ServerMetadata",
        "ModelReady",
        "ModelMetadata",
        "ModelConfig",
        "ModelInfer",
        "ModelStreamInfer",
        "ModelStatistics",
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "TraceSetting",
        "LogSettings",
    )
}


def _wire(request: Any) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def _parsed(kind: Any, content: bytes) -> Any:
    if kind is None:
        return {"bytes": base64.b64encode(content).decode()}
    return json_format.MessageToDict(kind.FromString(content), preserving_proto_field_name=True)


def _without_keys(text: str, context: Context) -> str:
    for name, key in context.keys.items():
        text = text.replace(key, f"<KEY_{name.upper()}>")
    return text


def normal(call: Call, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer without what may not be compared: times, server names, the parameters of answers."""
    answer = copy.deepcopy(answer)
    answer["message"] = _without_paths(answer["message"])
    response = answer["response"]
    for one in response if isinstance(response, list) else [response]:
        if isinstance(one, dict):
            if "error_message" in one:
                one["error_message"] = _without_paths(one["error_message"])
            _normal_response(call.rpc, one)
    return answer


def _normal_response(rpc: str, response: dict[str, Any]) -> None:
    if rpc in ("ModelInfer", "ModelStreamInfer"):
        infer = response.get("infer_response", response)
        parameters = infer.pop("parameters", {})  # ours carry provenance
        infer["parameters"] = {key: value for key, value in parameters.items() if key.startswith("triton_")}
        # Tensors are found by name; the order of an answer is nobody's promise.
        raw = iter(infer.pop("raw_output_contents", []))
        for tensor in infer.get("outputs", []):
            in_region = "shared_memory_region" in tensor.get("parameters", {})
            tensor["raw"] = None if in_region else next(raw, None)
        infer["outputs"] = sorted(infer.get("outputs", []), key=lambda tensor: str(tensor["name"]))
        infer["unclaimed"] = len(list(raw))
    elif rpc == "ModelMetadata":
        response.pop("platform", None)
        response.pop("properties", None)
    elif rpc == "ServerMetadata":
        response["extensions"] = sorted(response.get("extensions", []))
        response.pop("name", None)
        response.pop("version", None)
    elif rpc == "ModelConfig":
        config = response.get("config", {})
        kept = ("name", "max_batch_size", "input", "output")
        response["config"] = {key: config[key] for key in kept if key in config}
        for tensor in response["config"].get("output", []):
            tensor.pop("label_filename", None)
    elif rpc == "ModelStatistics":
        for one in response.get("model_stats", []):
            for key in (
                "last_inference",
                "memory_usage",
                "response_stats",
                "batch_stats",
                "inference_count",
                "execution_count",
            ):
                one.pop(key, None)
            one["inference_stats"] = sorted(one.get("inference_stats", {}))
    elif rpc == "RepositoryIndex":
        response["models"] = sorted(
            response.get("models", []), key=lambda m: (m["name"], m.get("version", ""))
        )


def _without_paths(message: str) -> str:
    message = re.sub(r"(/[\w.-]+)+/repository\b", "<REPOSITORY>", message)
    message = re.sub(r"\bline \d+|:\d+:\d+", "<LINE>", message)
    # Triton lists names in the order of a hash table.
    return re.sub(r"\['[^\]]*'\]", lambda match: f"[{','.join(sorted(match[0][1:-1].split(',')))}]", message)


# -- recording ---------------------------------------------------------------------------


def triton_repository(path: Path) -> None:
    """Writes every model into a Triton repository at `path`."""
    from bench.peers import triton

    for model, onnx in models().values():
        triton.add_version(path, model, 1, onnx)


def record() -> dict[str, Any]:
    """Asks the real tritonserver; returns the fixture's content."""
    from bench.peers import triton

    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        triton_repository(repository)
        with triton.start(repository, work=Path(folder), models=list(models())) as server:
            answers = asked(server.target)
    return {"server": "triton 2.51.0, python backend", "answers": answers}


def _short(answer: dict[str, Any]) -> str:
    return (
        f"{answer['code']} {answer['message']!r} {json.dumps(answer['response'], ensure_ascii=False)[:300]}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.probe",
        description="Send the list of calls to a server and print its answers, or record the real Triton's.",
        epilog="exit codes: 0 done, 1 answers differ, or no peer answered, 2 usage",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="start the real tritonserver and write its answers"
    )
    parser.add_argument("--server", metavar="HOST:PORT", help="ask this server and print its answers as JSON")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="print only what differs from these answers"
    )
    arguments = parser.parse_args(argv)
    if (arguments.record is None) == (arguments.server is None):
        parser.error("name one of --record and --server")
    if arguments.server:
        answers = asked(arguments.server)
        if arguments.against is None:
            print(json.dumps(answers, indent=1, ensure_ascii=False))
            return 0
        known = json.loads(arguments.against.read_text())["answers"]
        differ = {name: known[name] for name, answer in answers.items() if answer != known.get(name)}
        for name, theirs in differ.items():
            print(f"{name}\n  recorded {_short(theirs)}\n  this one {_short(answers[name])}")
        print(f"{len(differ)} of {len(answers)} answers differ")
        return 1 if differ else 0
    from bench.peers.environments import Absent

    try:
        content = record()
    except (Absent, RuntimeError) as error:
        print(f"bench.peers.probe: {error}", file=sys.stderr)
        return 1
    lines = ",\n".join(
        f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(answer, ensure_ascii=False, sort_keys=True)}"
        for name, answer in content["answers"].items()
    )
    server = json.dumps(content["server"])
    arguments.record.write_text(
        f'{{\n "server": {server},\n "answers": {{\n{lines}\n }}\n}}\n', encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
