"""Requests and answers as plain values, and the checks of a request against what a model takes.

The words of a refusal are Triton's, and so is the order: of two faults the same one is reported.  Knows
tensors; knows nothing of queues or of who is live.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.errors import Code, ServiceError
from runtime.serving.counters import Durations
from runtime.serving.slot import Slot
from runtime.shared_memory.system import ShmRef
from runtime.tensors import DTYPES, Array, EngineSpec, TensorSpec, TextError, decode_bytes

Parameter = bool | int | float | str
_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended "
    "to each input shape. If you want to specify the full shape including the batch dim in your input dims "
    "config, try setting max_batch_size to zero. See the model configuration docs for more info on "
    "max_batch_size."
)


@dataclass(slots=True)
class InputTensor:
    """`data`: raw little-endian bytes, an array (typed contents), or a place in shared memory that the
    service turns into bytes; None = the request brought none."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | Array | ShmRef | None


@dataclass(slots=True)
class OutputRequest:
    name: str
    classification: int = 0  # the k highest values as "value:index:label" instead of the tensor
    place: ShmRef | None = None  # where the answer goes when it does not go into the message


@dataclass(slots=True)
class InferRequest:
    model: str
    version: str
    id: str
    parameters: dict[str, Parameter]
    inputs: list[InputTensor]
    outputs: list[OutputRequest]

    @property
    def label(self) -> str:
        """How Triton's messages name a request."""
        return f"[request id: {self.id or '<id_unknown>'}] "


@dataclass(slots=True)
class Answer:
    """outputs in the order asked for: (name, KServe data type, array)."""

    model: str
    version: int
    id: str
    outputs: list[tuple[str, str, Array]]
    parameters: dict[str, str]
    places: dict[str, ShmRef] = field(default_factory=dict)  # outputs that lie in shared memory
    stages: Durations = field(default_factory=Durations)  # where the time went; of a group: of its members


def inputs(
    request: InferRequest, spec: EngineSpec, model: str, most: int = 0, whole: Collection[str] = ()
) -> dict[str, Array]:
    """The tensors of a request by name; raises ServiceError(INVALID_ARGUMENT) for the first that does not fit
    what `model` takes.  `most`: its max_batch_size, 0 = it has none.  `whole`: inputs without a batch side
    (config.pbtxt's is_shape_tensor).
    """
    given: dict[str, InputTensor] = {}
    prefix = request.label
    for tensor in request.inputs:
        if tensor.name in given:
            raise _invalid(f"{prefix}input '{tensor.name}' already exists in request")
        given[tensor.name] = tensor
        if tensor.data is None:
            raise _invalid(
                f"unable to find data for input tensor '{tensor.name}' for model '{model}' in request."
            )
    expected = [tensor.name for tensor in spec.inputs]
    missing = [name for name in expected if name not in given]
    if len(given) != len(expected):
        raise _invalid(
            f"{prefix}expected {len(expected)} inputs but got {len(given)} inputs for model '{model}'. "
            f"Got input(s) {_quoted(sorted(given))}, but missing required input(s) {_quoted(missing)}. "
            "Please provide all required input(s)."
        )
    for name in given:
        if name not in expected:
            raise _invalid(f"unexpected inference input '{name}' for model '{model}'")
    for want in spec.inputs:
        kind = given[want.name].datatype
        if kind != want.datatype:
            kind = kind if kind in DTYPES else "<invalid>"
            raise _invalid(
                f"{prefix}inference input '{want.name}' data-type is '{kind}', "
                f"but model '{model}' expects '{want.datatype}'"
            )
    batched = most > 0 and spec.batched
    first: int | None = None  # side of the batch, by the first input that has one
    for want in spec.inputs if batched else ():
        if want.name in whole:
            continue
        shape = given[want.name].shape
        if not shape:
            raise _invalid(
                f"{prefix}input '{want.name}' has no shape but model requires batch dimension for '{model}'"
            )
        first = shape[0] if first is None else first
        if shape[0] != first:  # its rows would be counted to another request of the same run
            raise _invalid(
                f"{prefix}input '{want.name}' batch size does not match other inputs for '{model}'"
            )
    if first is not None and first > most:
        raise _invalid(f"{prefix}inference request batch-size must be <= {most} for '{model}'")
    for want in spec.inputs:
        shape = given[want.name].shape
        if not want.fits(shape):
            raise _invalid(
                f"{prefix}unexpected shape for input '{want.name}' for model '{model}'. "
                f"Expected {_shape(want.shape)}, got {_shape(shape)}. {_NOTE if batched else ''}"
            )
        if min(shape, default=0) < 0:
            raise _invalid(
                f"{prefix}All input dimensions should be specified for input '{want.name}' "
                f"for model '{model}', got {_shape(shape)}"
            )
    return {want.name: _array(given[want.name], want, prefix, model) for want in spec.inputs}


def _array(given: InputTensor, spec: TensorSpec, prefix: str, model: str) -> Array:
    data = given.data
    assert data is not None
    assert not isinstance(data, ShmRef), "the service resolves places"
    if spec.datatype == "BYTES":
        try:
            array = _text(data, given.shape)
            for value in array.reshape(-1):  # here, because requests that share a run would fail together
                if isinstance(value, bytes):
                    value.decode()
        except TextError as error:
            raise _invalid(_text_message(error, prefix, spec.name, model)) from error
        except UnicodeDecodeError as error:
            message = f"{prefix}input '{spec.name}' for model '{model}' is not UTF-8, as its engine wants it"
            raise _invalid(message) from error
        return array
    dtype = DTYPES[spec.datatype]
    size = math.prod(given.shape) * dtype.itemsize
    got = data.nbytes if isinstance(data, np.ndarray) else len(data)
    if got != size:
        raise _invalid(
            f"{prefix}input byte size mismatch for input '{spec.name}' for model '{model}'. "
            f"Expected {size}, got {got}"
        )
    try:
        flat: Array = data.view(dtype) if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=dtype)
        array = flat.reshape(given.shape)
    except ValueError as error:  # no bytes, in a shape that no array can have
        raise _invalid(f"{prefix}shape {_shape(given.shape)} of input '{spec.name}' is too large") from error
    return array if array.flags.aligned else array.copy()


def names(request: InferRequest, slot: Slot, model: str) -> tuple[str, ...]:
    """The outputs that a request gets, in its order; raises ServiceError for one that is not there."""
    spec = slot.engine.spec
    for output in request.outputs:
        tensor = spec.output(output.name)
        if tensor is None:
            raise _invalid(f"unexpected inference output '{output.name}' for model '{model}'")
        if output.classification and tensor.datatype == "BYTES":
            raise _invalid("class result not available for output due to unsupported type 'BYTES'")
        if output.classification and slot.task is not None and slot.task.is_map(output.name):
            raise _invalid(
                f"{request.label}classification of '{output.name}' for model '{model}' has no "
                "meaning: it holds edges of every class at every pixel; ask for the tensor"
            )
    if request.outputs:
        return tuple(dict.fromkeys(output.name for output in request.outputs))
    if slot.task is not None:
        return slot.task.outputs
    return tuple(output.name for output in spec.outputs)


def parse_version(version: str) -> int | None:
    """A request's version string; None for "".  Raises ServiceError(INVALID_ARGUMENT) in Triton's words."""
    if not version:
        return None
    digits = version.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise _invalid(
            f"failed to get model version from specified version string '{version[:80]}' (details: stol), "
            "version should be an integral value > 0"
        )
    if version != digits:
        raise _invalid(
            f"invalid model version specified '{version}' , version should be an integral value > 0"
        )
    return int(version)


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "invalid")


def _shape(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"


def _text(data: bytes | memoryview | Array, shape: Sequence[int]) -> Array:
    if not isinstance(data, np.ndarray):
        return decode_bytes(data, shape)
    if data.dtype.kind != "O":  # shared memory
        return decode_bytes(data.data, shape)
    count = math.prod(shape)
    if data.size != count:
        few = data.size < count
        raise TextError("few" if few else "many", count if few else count + 1, data.size if few else count)
    return data.reshape(tuple(shape))


def _text_message(error: TextError, prefix: str, name: str, model: str) -> str:
    """Triton's words."""
    where = f"inference input '{name}' for model '{model}'"
    if error.kind == "few":
        return f"{prefix}expected {error.expected} string elements for {where}, got {error.got}"
    if error.kind == "many":
        found = f"unexpected number of string elements {error.expected} for {where}"
        return f"{prefix}{found}, expecting {error.got}"
    if error.kind == "short":
        return (
            f"incomplete string data for inference input '{name}', expecting string of length "
            f"{error.expected} but only {error.got} bytes available"
        )
    return (
        f"{prefix}incomplete string length indicator for {where}, expecting {error.expected} bytes but only "
        f"{error.got} bytes available. Please make sure the string length indicator is in one buffer."
    )


def classify(answer: Answer, output: OutputRequest, labels: Sequence[str], *, batched: bool = False) -> None:
    """Replaces a tensor by its highest values, "value:index[:label]": Triton's classification extension.
    `labels`: of the output, by index.  `batched`: those of each item, [N,k].
    """
    for position, (name, _, array) in enumerate(answer.outputs):
        if name != output.name or array.dtype.kind == "O":
            continue
        items = array if batched else array[None]
        rows = [_highest(item.reshape(-1), output.classification, labels) for item in items]
        answer.outputs[position] = (name, "BYTES", np.stack(rows) if batched else rows[0])


def _highest(flat: Array, count: int, labels: Sequence[str]) -> Array:
    order = np.argsort(-flat.astype(np.float64), kind="stable")[:count]
    texts = np.empty(len(order), np.object_)
    for rank, index in enumerate(order):
        value = f"{float(flat[index]):f}" if flat.dtype.kind == "f" else str(int(flat[index]))
        label = f":{labels[index]}" if index < len(labels) else ""
        texts[rank] = f"{value}:{index}{label}".encode()
    return texts


def _quoted(names: list[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def permission(parameters: Mapping[str, Parameter]) -> tuple[bool | None, tuple[float, float] | None]:
    """Returns (collect, place) from the parameters `collect`, `latitude` and `longitude`; None if absent.

    place: degrees.  A `collect` that is not a boolean forbids collection.
    """
    if not parameters:
        return None, None
    collect = parameters.get("collect")
    allowed = None if collect is None else collect is True
    try:
        place = (float(parameters["latitude"]), float(parameters["longitude"]))
    except (KeyError, ValueError, OverflowError):
        return allowed, None
    return allowed, place if all(math.isfinite(part) for part in place) else None
