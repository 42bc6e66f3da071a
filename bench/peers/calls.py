"""The list of calls, good and bad, that `bench.peers.probe` sends to a server, and the models they speak of.

Knows the wire and no server: neither how one is started nor which answers are right.  The calls are made
in order, because some of them change state (register, load).
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import shared_memory
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from bench import onnx_models
from bench.peers.triton import Model, Tensor

HEIGHT, WIDTH, CLASSES, STRIDE = 16, 24, 3, 8
LABELS = ("road", "sky", "tree")
SERVICE = "inference.GRPCInferenceService"
_FRAME = Tensor("frame", "UINT8", (-1, HEIGHT, WIDTH, 3))
_MAPS = (
    Tensor("labels", "UINT8", (-1, HEIGHT, WIDTH)),
    Tensor("confidence", "UINT8", (-1, HEIGHT, WIDTH)),
    Tensor("probabilities", "FP32", (-1, CLASSES, HEIGHT // STRIDE, WIDTH // STRIDE), "labels.txt"),
)


def _without_batch(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.datatype, tensor.dims[1:], tensor.labels)


def models() -> dict[str, tuple[Model, bytes]]:
    """The models that the calls speak of, by name: config.pbtxt and ONNX.

    seg      the graph contract, batch dimension in the shape (max_batch_size 0)
    batched  the same with Triton's own batch dimension (max_batch_size 4)
    fixed    the same for exactly one frame
    simple   two int32 inputs, as Triton's own example; text; types: every datatype;
             typed: every datatype that has a field in InferTensorContents
    """
    segmentation = onnx_models.segmentation(HEIGHT, WIDTH, classes=CLASSES, stride=STRIDE)
    single = onnx_models.segmentation(HEIGHT, WIDTH, classes=CLASSES, stride=STRIDE, batch=1)
    one = [Tensor(t.name, t.datatype, (1, *t.dims[1:]), t.labels) for t in (_FRAME, *_MAPS)]
    every = list(onnx_models.DATATYPES)

    def identities(name: str, types: list[str]) -> tuple[Model, bytes]:
        inputs = [Tensor(f"IN_{one}", one, (-1,)) for one in types]
        outputs = [Tensor(f"OUT_{one}", one, (-1,)) for one in types]
        return Model(name, inputs, outputs), onnx_models.identities(types)

    return {
        "seg": (Model("seg", [_FRAME], _MAPS, labels=LABELS), segmentation),
        "batched": (
            Model("batched", [_without_batch(_FRAME)], [_without_batch(t) for t in _MAPS], 4, labels=LABELS),
            segmentation,
        ),
        "fixed": (Model("fixed", one[:1], one[1:], labels=LABELS), single),
        "simple": (
            Model(
                "simple",
                [Tensor(f"INPUT{i}", "INT32", (-1, 16)) for i in range(2)],
                [Tensor(f"OUTPUT{i}", "INT32", (-1, 16)) for i in range(2)],
            ),
            onnx_models.sum_and_difference(),
        ),
        "text": (
            Model("text", [Tensor("TEXT", "BYTES", (-1,))], [Tensor("SAME", "BYTES", (-1,))]),
            onnx_models.text(),
        ),
        "types": identities("types", every),
        "typed": identities("typed", [one for one in every if one != "FP16"]),
    }


def frames(count: int = 1, seed: int = 7) -> np.ndarray:
    """uint8 [count,16,24,3]."""
    shape = (count, HEIGHT, WIDTH, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Context:
    """What the requests of one run share: the shared-memory regions behind fixed names."""

    def __init__(self) -> None:
        mark = uuid.uuid4().hex[:12]
        self.regions = {
            name: shared_memory.SharedMemory(f"rw_probe_{name}_{mark}", create=True, size=4096)
            for name in ("in", "out", "spare", "empty")
        }
        self.keys = {name: f"/rw_probe_{name}_{mark}" for name in self.regions}
        content = frames(1).tobytes()
        self.view("in")[: len(content)] = content

    def view(self, name: str) -> memoryview:
        """The bytes of a region."""
        buffer = self.regions[name].buf
        assert buffer is not None
        return buffer

    def close(self) -> None:
        for region in self.regions.values():
            region.close()
            region.unlink()


@dataclass(frozen=True)
class Call:
    """One call.

    name     unique; what a difference is listed under
    rpc      method of the service, or "/package.Service/Method"
    request  message, raw bytes (sent as they are), or a list of messages (a stream)
    model    the model it needs, "" for none: a server without that model cannot be asked
    shm      what of the output region is read afterwards: (offset, bytes)
    until_gone  asked again while this is in the answer: an unload goes on in the background
    """

    name: str
    rpc: str
    request: Callable[[Context], Any]
    model: str = ""
    shm: tuple[int, int] | None = None
    until_gone: str = ""


@dataclass
class _List:
    calls: list[Call] = field(default_factory=list)

    def add(self, name: str, rpc: str, request: Any, **more: Any) -> None:
        make = request if callable(request) else lambda _context, message=request: message
        self.calls.append(Call(name, rpc, make, **more))


def _input(name: str, datatype: str, shape: list[int], **parameters: int | str) -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    _parameters(tensor.parameters, parameters)
    return tensor


def _output(name: str, **parameters: int | str) -> Any:
    tensor = pb.ModelInferRequest.InferRequestedOutputTensor(name=name)
    _parameters(tensor.parameters, parameters)
    return tensor


def _parameters(target: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, bool):
            target[key].bool_param = value
        elif isinstance(value, str):
            target[key].string_param = value
        elif isinstance(value, float):
            target[key].double_param = value
        else:
            target[key].int64_param = value


def _infer(
    model: str,
    inputs: list[Any],
    raw: list[bytes] | None = None,
    outputs: list[Any] | None = None,
    *,
    version: str = "",
    id: str = "7",  # the field's own name
    parameters: dict[str, Any] | None = None,
) -> Any:
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    request.inputs.extend(inputs)
    request.outputs.extend(outputs or [])
    request.raw_input_contents.extend(raw or [])
    _parameters(request.parameters, parameters or {})
    return request


def _typed(tensor: Any, **contents: Any) -> Any:
    for key, values in contents.items():
        getattr(tensor.contents, key).extend(values)
    return tensor


def _bytes_tensor(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def calls() -> list[Call]:
    """Every call, in the order in which they are to be made."""
    out = _List()
    _server_calls(out)
    _model_calls(out)
    _segmentation_calls(out)
    _batch_calls(out)
    _simple_calls(out)
    _text_calls(out)
    _types_calls(out)
    _classification_calls(out)
    _parameter_calls(out)
    _stream_calls(out)
    _shared_memory_calls(out)
    _cuda_calls(out)
    _setting_calls(out)
    _wire_calls(out)
    _statistics_calls(out)
    _repository_calls(out)
    names = [call.name for call in out.calls]
    assert len(names) == len(set(names)), "names of calls must be unique"
    return out.calls


def _server_calls(out: _List) -> None:
    out.add("server live", "ServerLive", pb.ServerLiveRequest())
    out.add("server ready", "ServerReady", pb.ServerReadyRequest())
    out.add("server metadata", "ServerMetadata", pb.ServerMetadataRequest())


def _model_calls(out: _List) -> None:
    for rpc, message in (
        ("ModelReady", pb.ModelReadyRequest),
        ("ModelMetadata", pb.ModelMetadataRequest),
        ("ModelConfig", pb.ModelConfigRequest),
    ):
        out.add(f"{rpc}", rpc, message(name="seg"), model="seg")
        for title, name, version in (
            ("version 1", "seg", "1"),
            ("version 01", "seg", "01"),
            ("version 9", "seg", "9"),
            ("version -1", "seg", "-1"),
            ("version 0", "seg", "0"),
            ("version abc", "seg", "abc"),
            ("version 1x", "seg", "1x"),
            ("version ' 1'", "seg", " 1"),
            ("version too large", "seg", "99999999999999999999999"),
            ("unknown model", "nope", ""),
            ("unknown model, version", "nope", "1"),
            ("unknown model, version abc", "nope", "abc"),
            ("no name", "", ""),
            ("path as name", "../seg", ""),
            ("slash in name", "seg/1", ""),
        ):
            needed = "seg" if name == "seg" else ""
            out.add(f"{rpc}: {title}", rpc, message(name=name, version=version), model=needed)
    for name in ("batched", "simple", "text", "types", "typed", "fixed"):
        out.add(f"ModelMetadata of {name}", "ModelMetadata", pb.ModelMetadataRequest(name=name), model=name)
        out.add(f"ModelConfig of {name}", "ModelConfig", pb.ModelConfigRequest(name=name), model=name)


def _segmentation_calls(out: _List) -> None:
    frame = frames(1).tobytes()
    shape = [1, HEIGHT, WIDTH, 3]
    good = _input("frame", "UINT8", shape)

    def add(name: str, request: Any) -> None:
        out.add(f"infer seg: {name}", "ModelInfer", request, model="seg")

    add("good, all outputs", _infer("seg", [good], [frame]))
    add("good, one output", _infer("seg", [good], [frame], [_output("labels")]))
    add(
        "good, outputs in another order",
        _infer("seg", [good], [frame], [_output("confidence"), _output("labels")]),
    )
    add("good, probabilities", _infer("seg", [good], [frame], [_output("probabilities")]))
    add("good, no id", _infer("seg", [good], [frame], [_output("labels")], id=""))
    add("good, version 1", _infer("seg", [good], [frame], [_output("labels")], version="1"))
    add(
        "good, two frames",
        _infer(
            "seg",
            [_input("frame", "UINT8", [2, HEIGHT, WIDTH, 3])],
            [frames(2).tobytes()],
            [_output("labels")],
        ),
    )
    add("version 9", _infer("seg", [good], [frame], version="9"))
    add("version abc", _infer("seg", [good], [frame], version="abc"))
    add("version -1", _infer("seg", [good], [frame], [_output("labels")], version="-1"))
    add("version 01", _infer("seg", [good], [frame], [_output("labels")], version="01"))
    add("output named twice", _infer("seg", [good], [frame], [_output("labels"), _output("labels")]))
    add("unknown output", _infer("seg", [good], [frame], [_output("ZZ")]))
    add("unknown output, no id", _infer("seg", [good], [frame], [_output("ZZ")], id=""))
    add("empty output name", _infer("seg", [good], [frame], [_output("")]))
    add("no input", _infer("seg", []))
    add("no input, no id", _infer("seg", [], id=""))
    add("no input but raw contents", _infer("seg", [], [frame]))
    add("unknown input", _infer("seg", [_input("image", "UINT8", shape)], [frame]))
    add("empty input name", _infer("seg", [_input("", "UINT8", shape)], [frame]))
    add("input twice", _infer("seg", [good, good], [frame, frame]))
    add("extra input", _infer("seg", [good, _input("extra", "UINT8", [1])], [frame, b"\0"]))
    add("no contents", _infer("seg", [good]))
    add("two raw contents", _infer("seg", [good], [frame, frame]))
    add("wrong datatype", _infer("seg", [_input("frame", "FP32", shape)], [frame * 4]))
    add("wrong datatype of equal size", _infer("seg", [_input("frame", "INT8", shape)], [frame]))
    add("unknown datatype", _infer("seg", [_input("frame", "UINT9", shape)], [frame]))
    add("empty datatype", _infer("seg", [_input("frame", "", shape)], [frame]))
    add("lower-case datatype", _infer("seg", [_input("frame", "uint8", shape)], [frame]))
    add("datatype BYTES", _infer("seg", [_input("frame", "BYTES", shape)], [frame]))
    add(
        "wrong height",
        _infer("seg", [_input("frame", "UINT8", [1, 15, WIDTH, 3])], [frame[: 15 * WIDTH * 3]]),
    )
    add("channels first", _infer("seg", [_input("frame", "UINT8", [1, 3, HEIGHT, WIDTH])], [frame]))
    add("three dimensions", _infer("seg", [_input("frame", "UINT8", shape[1:])], [frame]))
    add("five dimensions", _infer("seg", [_input("frame", "UINT8", [1, *shape])], [frame]))
    add("no shape", _infer("seg", [_input("frame", "UINT8", [])], [frame]))
    add("batch 0", _infer("seg", [_input("frame", "UINT8", [0, *shape[1:]])], [b""]))
    add("batch -1", _infer("seg", [_input("frame", "UINT8", [-1, *shape[1:]])], [frame]))
    add(
        "height -16 and width -24",
        _infer("seg", [_input("frame", "UINT8", [1, -HEIGHT, -WIDTH, 3])], [frame]),
    )
    add("overflowing shape", _infer("seg", [_input("frame", "UINT8", [1 << 62, HEIGHT, WIDTH, 3])], [frame]))
    add("one byte short", _infer("seg", [good], [frame[:-1]]))
    add("one byte long", _infer("seg", [good], [frame + b"\0"]))
    add("empty contents", _infer("seg", [good], [b""]))
    pixels = list(frame)
    add("typed contents", _infer("seg", [_typed(_input("frame", "UINT8", shape), uint_contents=pixels)]))
    add(
        "typed contents, one short",
        _infer("seg", [_typed(_input("frame", "UINT8", shape), uint_contents=pixels[1:])]),
    )
    add(
        "typed contents, one long",
        _infer("seg", [_typed(_input("frame", "UINT8", shape), uint_contents=[*pixels, 1])]),
    )
    add(
        "typed contents of another type",
        _infer("seg", [_typed(_input("frame", "UINT8", shape), int_contents=pixels)]),
    )
    add(
        "typed contents out of range",
        _infer("seg", [_typed(_input("frame", "UINT8", shape), uint_contents=[300] * 1152)]),
    )
    both = _typed(_input("frame", "UINT8", shape), uint_contents=pixels)
    add("typed and raw contents", _infer("seg", [both], [frame]))
    two = _typed(_input("frame", "UINT8", shape), uint_contents=pixels, int_contents=[1])
    add("two kinds of typed contents", _infer("seg", [two]))
    for name in ("nope", "", "../seg", "seg/1"):
        out.add(f"infer: model {name!r}", "ModelInfer", _infer(name, [good], [frame]))
    out.add("infer: unknown model, version 1", "ModelInfer", _infer("nope", [good], [frame], version="1"))
    out.add("infer: empty request", "ModelInfer", pb.ModelInferRequest())
    out.add(
        "infer fixed: good",
        "ModelInfer",
        _infer("fixed", [good], [frame], [_output("labels")]),
        model="fixed",
    )
    pair = _infer("fixed", [_input("frame", "UINT8", [2, *shape[1:]])], [frames(2).tobytes()])
    out.add("infer fixed: two frames", "ModelInfer", pair, model="fixed")


def _batch_calls(out: _List) -> None:
    def request(count: int, *, shape: list[int] | None = None) -> Any:
        shape = [count, HEIGHT, WIDTH, 3] if shape is None else shape
        content = frames(count).tobytes() if count > 0 else b""
        return _infer("batched", [_input("frame", "UINT8", shape)], [content], [_output("labels")])

    for count in (1, 4, 5, 0):
        out.add(f"infer batched: batch {count}", "ModelInfer", request(count), model="batched")
    out.add(
        "infer batched: no batch dimension",
        "ModelInfer",
        request(1, shape=[HEIGHT, WIDTH, 3]),
        model="batched",
    )
    out.add(
        "infer batched: batch -1", "ModelInfer", request(1, shape=[-1, HEIGHT, WIDTH, 3]), model="batched"
    )
    out.add("infer batched: no shape", "ModelInfer", request(1, shape=[]), model="batched")
    out.add("infer batched: wrong width", "ModelInfer", request(1, shape=[1, HEIGHT, 23, 3]), model="batched")


def _simple_calls(out: _List) -> None:
    row = np.arange(16, dtype=np.int32)
    raw = row.tobytes()

    def tensor(i: int, datatype: str = "INT32", shape: list[int] | None = None) -> Any:
        return _input(f"INPUT{i}", datatype, [1, 16] if shape is None else shape)

    def add(name: str, request: Any) -> None:
        out.add(f"infer simple: {name}", "ModelInfer", request, model="simple")

    add("good", _infer("simple", [tensor(0), tensor(1)], [raw, raw]))
    add(
        "good, inputs in another order",
        _infer("simple", [tensor(1), tensor(0)], [raw, (row * 3).astype("<i4").tobytes()]),
    )
    add("typed", _infer("simple", [_typed(tensor(i), int_contents=row.tolist()) for i in range(2)]))
    add(
        "one typed, one raw",
        _infer("simple", [_typed(tensor(0), int_contents=row.tolist()), tensor(1)], [raw]),
    )
    add("one raw content of two", _infer("simple", [tensor(0), tensor(1)], [raw]))
    add("three raw contents of two", _infer("simple", [tensor(0), tensor(1)], [raw, raw, raw]))
    add("missing input", _infer("simple", [tensor(0)], [raw]))
    add("missing input, no id", _infer("simple", [tensor(0)], [raw], id=""))
    add("same input twice", _infer("simple", [tensor(0), tensor(0)], [raw, raw]))
    add("extra input", _infer("simple", [tensor(0), tensor(1), tensor(2)], [raw, raw, raw]))
    add("wrong name", _infer("simple", [tensor(0), tensor(2)], [raw, raw]))
    add("wrong datatype", _infer("simple", [tensor(0), tensor(1, "FP32")], [raw, raw]))
    add("wrong datatype, no id", _infer("simple", [tensor(0), tensor(1, "FP32")], [raw, raw], id=""))
    add("wrong width", _infer("simple", [tensor(0), tensor(1, shape=[1, 15])], [raw, raw[:60]]))
    add("short", _infer("simple", [tensor(0), tensor(1)], [raw, raw[:60]]))
    add(
        "two faults: datatype and output",
        _infer("simple", [tensor(0), tensor(1, "FP32")], [raw, raw], [_output("ZZ")]),
    )
    add("two faults: missing and short", _infer("simple", [tensor(0)], [raw[:60]]))
    add(
        "two faults: shape and datatype",
        _infer("simple", [tensor(0), tensor(1, "FP32", [1, 15])], [raw, raw[:60]]),
    )


def _text_calls(out: _List) -> None:
    def add(name: str, request: Any) -> None:
        out.add(f"infer text: {name}", "ModelInfer", request, model="text")

    def tensor(count: int) -> Any:
        return _input("TEXT", "BYTES", [count])

    good = _bytes_tensor(b"road", b"", "ü€".encode())
    add("good", _infer("text", [tensor(3)], [good]))
    add("typed", _infer("text", [_typed(tensor(3), bytes_contents=[b"road", b"", "ü€".encode()])]))
    add("typed, one too few", _infer("text", [_typed(tensor(3), bytes_contents=[b"road", b""])]))
    add("typed, one too many", _infer("text", [_typed(tensor(1), bytes_contents=[b"road", b""])]))
    add("one element too few", _infer("text", [tensor(3)], [_bytes_tensor(b"road", b"")]))
    add("one element too many", _infer("text", [tensor(1)], [good]))
    add("length past the end", _infer("text", [tensor(1)], [struct.pack("<I", 99) + b"road"]))
    add("length 4 GiB", _infer("text", [tensor(1)], [struct.pack("<I", 0xFFFFFFFF) + b"road"]))
    add("torn length", _infer("text", [tensor(2)], [_bytes_tensor(b"road") + b"\1\0"]))
    add("no element", _infer("text", [tensor(0)], [b""]))
    add("wrong datatype", _infer("text", [_input("TEXT", "UINT8", [4])], [b"road"]))


def _types_calls(out: _List) -> None:
    dtypes = {
        "BOOL": "?",
        "INT8": "i1",
        "INT16": "<i2",
        "INT32": "<i4",
        "INT64": "<i8",
        "UINT8": "u1",
        "UINT16": "<u2",
        "UINT32": "<u4",
        "UINT64": "<u8",
        "FP16": "<f2",
        "FP32": "<f4",
        "FP64": "<f8",
    }
    contents = {
        "BOOL": "bool_contents",
        "INT8": "int_contents",
        "INT16": "int_contents",
        "INT32": "int_contents",
        "INT64": "int64_contents",
        "UINT8": "uint_contents",
        "UINT16": "uint_contents",
        "UINT32": "uint_contents",
        "UINT64": "uint64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
    }
    raw = [np.array([0, 1, 1], dtype).tobytes() for dtype in dtypes.values()]
    tensors = [_input(f"IN_{name}", name, [3]) for name in dtypes]
    out.add("infer types: raw", "ModelInfer", _infer("types", tensors, raw), model="types")
    typed = [
        _typed(_input(f"IN_{name}", name, [3]), **{contents[name]: [0, 1, 1]})
        for name in dtypes
        if name in contents
    ]
    out.add("infer types: typed without FP16", "ModelInfer", _infer("types", typed), model="types")
    out.add("infer typed: typed", "ModelInfer", _infer("typed", typed), model="typed")
    half = _typed(_input("IN_FP16", "FP16", [3]), fp32_contents=[0, 1, 1])
    out.add("infer types: typed with FP16", "ModelInfer", _infer("types", [half, *typed]), model="types")
    for name, field_name in (
        ("INT8", "int_contents"),
        ("UINT16", "uint_contents"),
        ("FP32", "fp32_contents"),
    ):
        short = [t for t in typed if t.name != f"IN_{name}"]
        wrong = _typed(_input(f"IN_{name}", name, [3]), **{field_name: [0, 1]})
        out.add(
            f"infer typed: {name} one short", "ModelInfer", _infer("typed", [wrong, *short]), model="typed"
        )


def _classification_calls(out: _List) -> None:
    frame = frames(1).tobytes()
    good = _input("frame", "UINT8", [1, HEIGHT, WIDTH, 3])
    for count in (1, 3, 100, 0, -1):
        request = _infer("seg", [good], [frame], [_output("probabilities", classification=count)])
        out.add(f"classification {count} of probabilities", "ModelInfer", request, model="seg")
    text_count = _infer("seg", [good], [frame], [_output("probabilities", classification="2")])
    out.add("classification as a string", "ModelInfer", text_count, model="seg")
    labels = _infer("seg", [good], [frame], [_output("labels", classification=2)])
    out.add("classification 2 of labels", "ModelInfer", labels, model="seg")
    batched = _infer(
        "batched",
        [_input("frame", "UINT8", [2, HEIGHT, WIDTH, 3])],
        [frames(2).tobytes()],
        [_output("probabilities", classification=2)],
    )
    out.add("classification 2, batched", "ModelInfer", batched, model="batched")
    row = np.arange(16, dtype=np.int32).tobytes()
    simple = _infer(
        "simple",
        [_input(f"INPUT{i}", "INT32", [1, 16]) for i in range(2)],
        [row, row],
        [_output("OUTPUT0", classification=3)],
    )
    out.add("classification 3 of int32", "ModelInfer", simple, model="simple")


def _parameter_calls(out: _List) -> None:
    frame = frames(1).tobytes()
    good = _input("frame", "UINT8", [1, HEIGHT, WIDTH, 3])
    for title, parameters in (
        ("priority 1", {"priority": 1}),
        ("priority 0", {"priority": 0}),
        ("priority -1", {"priority": -1}),
        ("priority as a string", {"priority": "high"}),
        ("timeout 10 s", {"timeout": 10_000_000}),
        ("timeout 0", {"timeout": 0}),
        ("timeout -1", {"timeout": -1}),
        ("timeout as a string", {"timeout": "soon"}),
        ("unknown parameter", {"colour": "red"}),
        ("reserved triton_ parameter", {"triton_enable_empty_final_response": True}),
        ("unknown triton_ parameter", {"triton_colour": "red"}),
        ("sequence_id", {"sequence_id": 5}),
        ("sequence_id as a string", {"sequence_id": "five"}),
        ("sequence_start without id", {"sequence_start": True}),
        ("binary_data_output", {"binary_data_output": True}),
        ("headers", {"headers": "x"}),
        ("double parameter", {"weight": 0.5}),
    ):
        request = _infer("seg", [good], [frame], [_output("labels")], parameters=dict(parameters))
        out.add(f"parameter: {title}", "ModelInfer", request, model="seg")
    unknown = _infer(
        "seg", [_input("frame", "UINT8", [1, HEIGHT, WIDTH, 3], colour="red")], [frame], [_output("labels")]
    )
    out.add("parameter: unknown, of an input", "ModelInfer", unknown, model="seg")
    unknown = _infer("seg", [good], [frame], [_output("labels", colour="red")])
    out.add("parameter: unknown, of an output", "ModelInfer", unknown, model="seg")
    binary = _infer("seg", [good], [frame], [_output("labels", binary_data=False)])
    out.add("parameter: binary_data false", "ModelInfer", binary, model="seg")


def _stream_calls(out: _List) -> None:
    frame = frames(1).tobytes()
    good = _infer("seg", [_input("frame", "UINT8", [1, HEIGHT, WIDTH, 3])], [frame], [_output("labels")])
    bad = _infer("seg", [_input("frame", "UINT8", [1, HEIGHT, WIDTH, 3])], [frame[:-1]])
    unknown = _infer("nope", [_input("frame", "UINT8", [1, HEIGHT, WIDTH, 3])], [frame])
    final = _infer(
        "seg",
        [_input("frame", "UINT8", [1, HEIGHT, WIDTH, 3])],
        [frame],
        [_output("labels")],
        parameters={"triton_enable_empty_final_response": True},
    )
    out.add("stream: nothing", "ModelStreamInfer", [])
    out.add("stream: two good", "ModelStreamInfer", lambda _c: [good, good], model="seg")
    out.add("stream: good, bad, good", "ModelStreamInfer", lambda _c: [good, bad, good], model="seg")
    out.add("stream: unknown model, then good", "ModelStreamInfer", lambda _c: [unknown, good], model="seg")
    out.add("stream: final response asked for", "ModelStreamInfer", lambda _c: [final], model="seg")


def _shared_memory_calls(out: _List) -> None:
    size = HEIGHT * WIDTH * 3
    maps = HEIGHT * WIDTH
    shape = [1, HEIGHT, WIDTH, 3]

    def register(name: str, region: str, key: str | None = None, offset: int = 0, size: int = 4096) -> None:
        def make(context: Context) -> Any:
            where = key if key is not None else context.keys[region]
            return pb.SystemSharedMemoryRegisterRequest(name=name, key=where, offset=offset, byte_size=size)

        title = f"shm register: {name or 'no name'}, {key if key is not None else region}, {offset}, {size}"
        if any(call.name == title for call in out.calls):
            title += ", again"
        out.add(title, "SystemSharedMemoryRegister", make)

    def status(title: str, name: str = "") -> None:
        out.add(title, "SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(name=name))

    def infer(title: str, tensor: dict[str, Any], output: dict[str, Any] | None = None, **more: Any) -> None:
        outputs = [_output("labels", **(output or {}))]
        request = _infer("seg", [_input("frame", "UINT8", shape, **tensor)], more.pop("raw", None), outputs)
        out.add(f"shm infer: {title}", "ModelInfer", request, model="seg", **more)

    def region(name: str, byte_size: int | None = None, offset: int | None = None) -> dict[str, Any]:
        values: dict[str, Any] = {"shared_memory_region": name}
        if byte_size is not None:
            values["shared_memory_byte_size"] = byte_size
        if offset is not None:
            values["shared_memory_offset"] = offset
        return values

    status("shm status: none registered")
    status("shm status: unknown region", "nothing")
    register("ghost", "in", key="/rw_no_such_key")
    register("empty key", "in", key="")
    register("no slash", "in", key="rw_no_such_key_either")
    register("climber", "in", key="/../etc/passwd")
    register("inside", "in")
    register("outside", "out")
    register("inside", "in")  # registered already
    register("inside", "out")  # the same name for another key
    register("alias", "in", offset=64, size=512)  # another name for the same key
    register("long", "spare", size=1 << 20)
    register("far", "spare", offset=1 << 20, size=16)
    register("wrap", "spare", offset=(1 << 64) - 4096, size=8192)
    register("huge", "spare", size=(1 << 64) - 1)
    register("part", "spare", offset=64, size=512)
    register("nothing at all", "empty", size=0)
    status("shm status: all")
    status("shm status: one", "inside")
    infer("good input", region("inside", size))
    infer("good input and output", region("inside", size), region("outside", maps), shm=(0, maps))
    infer("output with offset", region("inside", size, 0), region("outside", maps, 1024), shm=(1024, maps))
    infer("output larger than needed", region("inside", size), region("outside", 2048), shm=(0, maps))
    infer("unknown region", region("nothing", size))
    infer("unknown output region", region("inside", size), region("nothing", maps))
    infer("no byte size", region("inside"))
    infer("no byte size of the output", region("inside", size), region("outside"))
    infer("byte size too small", region("inside", size - 1))
    infer("byte size too large", region("inside", size + 1))
    infer("byte size 0", region("inside", 0))
    infer("byte size negative", region("inside", -size))
    infer("past the end", region("inside", size, 4096 - size + 1))
    infer("just inside the end", region("inside", size, 4096 - size))
    infer("offset past the end", region("inside", size, 1 << 40))
    infer("offset negative", region("inside", size, -8))
    infer("offset and size overflow", region("inside", size, (1 << 63) - 1))
    infer("byte size as a string", {"shared_memory_region": "inside", "shared_memory_byte_size": "many"})
    infer("region as a number", {"shared_memory_region": 5, "shared_memory_byte_size": size})
    infer("byte size without region", {"shared_memory_byte_size": size})
    infer("region and raw contents", region("inside", size), raw=[frames(1).tobytes()])
    infer("output too small", region("inside", size), region("outside", maps - 1))
    infer("output past the end", region("inside", size), region("outside", maps, 4096 - maps + 1))
    out.add(
        "shm unregister: unknown",
        "SystemSharedMemoryUnregister",
        pb.SystemSharedMemoryUnregisterRequest(name="nothing"),
    )
    out.add(
        "shm unregister: inside",
        "SystemSharedMemoryUnregister",
        pb.SystemSharedMemoryUnregisterRequest(name="inside"),
    )
    infer("after unregister", region("inside", size))
    out.add("shm unregister: all", "SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest())
    status("shm status: none again")
    register("", "in")
    status("shm status: the one without name")
    out.add(
        "shm unregister: all again", "SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest()
    )


def _cuda_calls(out: _List) -> None:
    out.add("cuda status", "CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest())
    out.add(
        "cuda status: unknown", "CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest(name="nothing")
    )
    out.add(
        "cuda register",
        "CudaSharedMemoryRegister",
        pb.CudaSharedMemoryRegisterRequest(name="gpu", raw_handle=b"\0" * 64, device_id=0, byte_size=64),
    )
    out.add(
        "cuda unregister: unknown",
        "CudaSharedMemoryUnregister",
        pb.CudaSharedMemoryUnregisterRequest(name="nothing"),
    )
    out.add("cuda unregister: all", "CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest())


def _setting_calls(out: _List) -> None:
    out.add("trace settings", "TraceSetting", pb.TraceSettingRequest())
    out.add("trace settings of seg", "TraceSetting", pb.TraceSettingRequest(model_name="seg"), model="seg")
    out.add("trace settings of an unknown model", "TraceSetting", pb.TraceSettingRequest(model_name="nope"))
    bad = pb.TraceSettingRequest()
    bad.settings["trace_colour"].value.append("red")
    out.add("trace settings: unknown key", "TraceSetting", bad)
    bad = pb.TraceSettingRequest()
    bad.settings["trace_rate"].value.append("often")
    out.add("trace settings: bad value", "TraceSetting", bad)
    out.add("log settings", "LogSettings", pb.LogSettingsRequest())
    verbose = pb.LogSettingsRequest()
    verbose.settings["log_verbose_level"].uint32_param = 0
    out.add("log settings: set", "LogSettings", verbose)
    bad_log = pb.LogSettingsRequest()
    bad_log.settings["log_colour"].string_param = "red"
    out.add("log settings: unknown key", "LogSettings", bad_log)
    bad_log = pb.LogSettingsRequest()
    bad_log.settings["log_info"].string_param = "yes"
    out.add("log settings: wrong type", "LogSettings", bad_log)
    bad_log = pb.LogSettingsRequest()
    bad_log.settings["log_format"].string_param = "poem"
    out.add("log settings: unknown format", "LogSettings", bad_log)


def _wire_calls(out: _List) -> None:
    out.add("wire: garbage to ModelInfer", "ModelInfer", b"\xff\xff\xff\xff")
    out.add("wire: torn ModelInfer", "ModelInfer", b"\x0a\x05seg")
    out.add("wire: garbage to ModelReady", "ModelReady", b"\xff\xff\xff\xff")
    out.add("wire: invalid UTF-8 in a name", "ModelReady", b"\x0a\x02\xff\xfe")
    out.add("wire: unknown field", "ServerLive", b"\xa2\x1f\x03abc")
    out.add("wire: unknown method", "ModelDance", b"")
    out.add("wire: unknown service", "/inference.Other/ServerLive", b"")
    out.add("health check", "/grpc.health.v1.Health/Check", b"")
    out.add("health check of the service", "/grpc.health.v1.Health/Check", b"\x0a\x1e" + SERVICE.encode())
    out.add("health check of an unknown service", "/grpc.health.v1.Health/Check", b"\x0a\x04nope")


def _statistics_calls(out: _List) -> None:
    out.add("statistics of seg", "ModelStatistics", pb.ModelStatisticsRequest(name="seg"), model="seg")
    out.add(
        "statistics of seg, version 1",
        "ModelStatistics",
        pb.ModelStatisticsRequest(name="seg", version="1"),
        model="seg",
    )
    for title, name, version in (
        ("version 9", "seg", "9"),
        ("version abc", "seg", "abc"),
        ("unknown model", "nope", ""),
        ("unknown model, version 1", "nope", "1"),
    ):
        request = pb.ModelStatisticsRequest(name=name, version=version)
        out.add(f"statistics: {title}", "ModelStatistics", request, model="seg" if name == "seg" else "")


def _repository_calls(out: _List) -> None:
    frame = frames(1).tobytes()
    good = _infer("seg", [_input("frame", "UINT8", [1, HEIGHT, WIDTH, 3])], [frame], [_output("labels")])

    def load(name: str, **parameters: Any) -> Any:
        request = pb.RepositoryModelLoadRequest(model_name=name)
        for key, value in parameters.items():
            target = request.parameters[key]
            if isinstance(value, str):
                target.string_param = value
            elif isinstance(value, bytes):
                target.bytes_param = value
            else:
                target.int64_param = value
        return request

    def unload(name: str, **parameters: bool) -> Any:
        request = pb.RepositoryModelUnloadRequest(model_name=name)
        for key, value in parameters.items():
            request.parameters[key].bool_param = value
        return request

    out.add("index", "RepositoryIndex", pb.RepositoryIndexRequest())
    out.add("index: ready", "RepositoryIndex", pb.RepositoryIndexRequest(ready=True))
    out.add(
        "index: unknown repository", "RepositoryIndex", pb.RepositoryIndexRequest(repository_name="elsewhere")
    )
    out.add("load: unknown model", "RepositoryModelLoad", load("nope"))
    out.add("load: no name", "RepositoryModelLoad", load(""))
    out.add("load: path as name", "RepositoryModelLoad", load("../seg"))
    out.add(
        "load: unknown repository",
        "RepositoryModelLoad",
        pb.RepositoryModelLoadRequest(repository_name="x", model_name="seg"),
    )
    out.add("load: already loaded", "RepositoryModelLoad", load("seg"), model="seg")
    out.add("load: config is not JSON", "RepositoryModelLoad", load("seg", config="{"), model="seg")
    out.add("load: config of wrong type", "RepositoryModelLoad", load("seg", config=5), model="seg")
    out.add(
        "load: file without config",
        "RepositoryModelLoad",
        load("seg", **{"file:1/model.onnx": b"x"}),
        model="seg",
    )
    out.add("load: unknown parameter", "RepositoryModelLoad", load("seg", colour="red"), model="seg")
    out.add("unload: unknown model", "RepositoryModelUnload", unload("nope"))
    out.add("unload: no name", "RepositoryModelUnload", unload(""))
    out.add(
        "unload: unknown repository",
        "RepositoryModelUnload",
        pb.RepositoryModelUnloadRequest(repository_name="x", model_name="nope"),
    )
    out.add("unload: unknown parameter", "RepositoryModelUnload", unload("nope", colour=True))
    out.add("unload: seg", "RepositoryModelUnload", unload("seg", unload_dependents=True), model="seg")
    out.add("unloaded: ready", "ModelReady", pb.ModelReadyRequest(name="seg"), model="seg")
    out.add(
        "unloaded: ready, version 1", "ModelReady", pb.ModelReadyRequest(name="seg", version="1"), model="seg"
    )
    out.add("unloaded: metadata", "ModelMetadata", pb.ModelMetadataRequest(name="seg"), model="seg")
    out.add("unloaded: config", "ModelConfig", pb.ModelConfigRequest(name="seg"), model="seg")
    out.add("unloaded: infer", "ModelInfer", good, model="seg")
    version = pb.ModelInferRequest()
    version.CopyFrom(good)
    version.model_version = "1"
    out.add("unloaded: infer, version 1", "ModelInfer", version, model="seg")
    out.add("unloaded: statistics", "ModelStatistics", pb.ModelStatisticsRequest(name="seg"), model="seg")
    out.add(
        "unloaded: index", "RepositoryIndex", pb.RepositoryIndexRequest(), model="seg", until_gone="UNLOADING"
    )
    out.add("unload: seg again", "RepositoryModelUnload", unload("seg"), model="seg")
    out.add("load: seg again", "RepositoryModelLoad", load("seg"), model="seg")
    out.add("loaded again: infer", "ModelInfer", good, model="seg")
    out.add("server still live", "ServerLive", pb.ServerLiveRequest())
