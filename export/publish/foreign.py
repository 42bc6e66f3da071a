"""Put somebody's ONNX file into a repository as it is: served, versioned and swapped, without our contract.

Such a version has no golden frames and no classes we know of, so what the guard can check is less: it
loads, runs, answers finite numbers and promises the same tensors as the version before it.  A graph whose
tensors are those of our contract is served as a segmentation engine; its golden frames are synthetic, and
the answers to them are those of ONNX Runtime without any optimisation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from common.text import printable, shorten
from export.describe import describe_onnx
from export.errors import ExportError
from export.graph.contract import Contract
from export.graph.onnx_file import external_tensors, parse_onnx, read_file
from export.parity import golden as parity_golden
from export.parity import parity, rows, samples
from export.publish import triton_config
from export.publish.publish import Published, libraries, model_name, publish
from runtime.checks import golden as read_golden
from runtime.checks.task import recognise
from runtime.config import EngineConfig
from runtime.engines import load
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.tensors import EngineSpec

if TYPE_CHECKING:
    from runtime.repository.repository import Repository

#: Seconds that a graph may take for its first answer, and again for the answers that show whether its rows
#: are independent; one that loops for ever is given up then.
LONGEST = 300.0
#: The version's file of the inputs that the build ran.
INPUTS = read_golden.INPUTS
#: What answers are compared with.
PLAIN = "onnxruntime without optimisation"


def publish_onnx(
    file: Path | str,
    repository: Path | str | Repository,
    name: str,
    *,
    labels: list[str] | None = None,
    size: tuple[int, int] | None = None,
    config: Path | str | None = None,
    inputs: Path | str | None = None,
) -> Published:
    """Check an ONNX file, run it, find out whether its rows may share a run, and publish it.

    The inputs that were run become a file of the version, so that a server can run them too.

    Args:
        labels: class names for labels.txt.
        size: sides of the made-up image where the graph leaves them open; None: 256x256.
        config: somebody's own config.pbtxt (batching, queues, priorities); the graph says what it leaves out.
        inputs: an .npz with one array for each input of the graph; None: made-up ones.
    Raises:
        ExportError: no ONNX, a configuration of something else, weights in other files, an invalid graph,
            one that ONNX Runtime refuses, whose answers are not finite or not of the shapes that it declares,
            or a configuration that lets rows share a run that depend on each other.
    """
    path, model = Path(file), model_name(name)
    content = read_file(path)  # once: what is looked at is what is published
    graph = parse_onnx(content, path)
    if outside := external_tensors(graph):
        raise ExportError(
            f"{str(path)!r} keeps {len(outside)} weights in other files; a version is one file: "
            "save it with onnx.save(onnx.load(FILE), NEW)"
        )
    newest = onnx.defs.onnx_opset_version()
    opset = next((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset > newest:
        raise ExportError(
            f"{str(path)!r} is of opset {opset}, the newest known here is {newest}: "
            "export it with an older opset, or install a newer onnx and onnxruntime"
        )
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{str(path)!r} is not a valid graph: {shorten(error, 200)}") from error
    known = {i.name for i in graph.graph.initializer}
    taken = triton_config.tensors([v for v in graph.graph.input if v.name not in known])
    outputs = triton_config.tensors(graph.graph.output)
    if not taken or not outputs:
        raise ExportError(f"{str(path)!r} has no input or no output")
    own = parity_golden.read_text(Path(config)) if config is not None else None
    most = triton_config.asked(own, str(config)) if own is not None else 0
    rows_open = triton_config.batched([*taken, *outputs])
    tried = _try(content, graph, size, inputs, most or triton_config.MAX_BATCH, rows_open)
    _as_declared(outputs, tried.answers)
    independent = not tried.dependence
    described = triton_config.config(model, "onnxruntime", taken, outputs, independent=independent)
    if own is not None:
        described = triton_config.merged(own, str(config), described, dependence=tried.dependence)
    facts = describe_onnx(graph, path)
    manifest: dict[str, Any] = {
        "task": "foreign",
        "engine": {
            "kind": "onnxruntime",
            "precision": facts["precision"],
            "file": "model.onnx",
            "opset": facts["opsets"].get("ai.onnx", 0),
        },
        "input": {t.name: {"type": t.type, "shape": list(t.shape)} for t in taken},
        "classes": labels or [],
        "colours": [],
        "pack": {},
        "adaptation": {},
        "gate": {},
        "parity": {
            "frames": 0,
            "agreement": None,
            "engine_ms": round(1000 * tried.seconds, 3),
            "inputs": tried.origin,
            "reference": PLAIN,
            "largest_difference": _apart(content, tried),
        },
        "batching": {"independent": independent if rows_open else None, "reason": tried.dependence},
        "source": {
            "file": printable(path.name),
            "producer": facts["producer"],
            "tensorrt": facts["tensorrt"],
        },
        "libraries": libraries(),
    }
    files = {"model.onnx": content}
    if recognise(tried.spec):
        manifest |= {"task": "segmentation", "colours": [[0, 0, 0]] * len(labels or [])}
        frames = tried.feed["frame"] if inputs is not None else None
        files["golden.npz"], report = _golden(content, graph, labels, size, frames)
        manifest["parity"] = {**report, "engine_ms": round(1000 * tried.seconds, 3)}
    elif sum(array.nbytes for array in tried.feed.values()) <= samples.MOST_BYTES:
        files[INPUTS] = samples.archive(tried.feed)
    return publish(repository, model, files, manifest, described, labels)


def _golden(
    content: bytes,
    graph: onnx.ModelProto,
    labels: list[str] | None,
    size: tuple[int, int] | None,
    given: np.ndarray | None,
) -> tuple[bytes, dict[str, Any]]:
    """golden.npz and the parity report of a graph under our contract.  `given`: frames; None: synthetic."""
    if not labels:
        raise ExportError("the graph has our contract's outputs: name its classes, --labels FILE, one a line")
    batch, *sides = [side if isinstance(side, int) else 0 for side in samples.inputs_of(graph)[0].sides]
    height, width = size or (256, 256)
    frames = parity_golden.synthetic((sides[0] or height, sides[1] or width)) if given is None else given
    frames = frames[: parity_golden.LARGEST]
    plain = _plain(content)
    engine = load(content, "onnxruntime", "fp32", EngineConfig(threads=1), candidate=False)
    contract = Contract("segmentation", tuple(labels))
    truth: dict[str, list[np.ndarray]] = {name: [] for name in contract.compared}
    answers: dict[str, list[np.ndarray]] = {name: [] for name in contract.compared}
    for frame in frames:
        feed = {"frame": np.repeat(frame[None], batch or 1, axis=0)}
        served = engine.run(feed, contract.compared)
        for name, wanted in zip(contract.compared, plain.run(list(contract.compared), feed), strict=True):
            truth[name].append(wanted[0])
            answers[name].append(served[name][0])
    engine.close()
    expected, found = ({k: np.stack(v) for k, v in side.items()} for side in (truth, answers))
    top = int(expected["labels"].max())
    if top >= len(labels):
        raise ExportError(f"the graph answers class {top}, --labels names {len(labels)}")
    report = parity.judge(parity.compare(found, expected, contract), parity.DEFAULTS["fp32"])
    report |= {"golden": "synthetic" if given is None else "given", "reference": PLAIN}
    if not report["passed"]:
        raise ExportError(f"ONNX Runtime optimised answers otherwise: {'; '.join(report['missed'])}")
    return parity_golden.archive(frames, expected, found, "fp32"), report


def _plain(content: bytes) -> Any:
    """ONNX Runtime's session of a graph without any optimisation."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what it says it also raises
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _apart(content: bytes, tried: _Tried) -> dict[str, float]:
    """By how much the answers differ from those without optimisation at most, by output of numbers."""
    names = [name for name, answer in tried.answers.items() if answer.dtype.kind in "biuf"]
    if not names:
        return {}
    try:
        truth = _plain(content).run(names, tried.feed)
    except Exception as error:  # onnxruntime raises types of its own
        raise ExportError(f"the graph runs optimised only: {shorten(error, 200)}") from error
    found = {}
    for name, wanted in zip(names, truth, strict=True):
        answer = tried.answers[name]
        if answer.shape == wanted.shape:  # of random answers, as many as the data says
            difference = np.abs(answer.astype(np.float64) - wanted.astype(np.float64))
            found[name] = float(difference.max(initial=0.0))
    return found


@dataclass(frozen=True)
class _Tried:
    """What a graph was run on, and what became of it.

    origin      "given" or "made up"
    seconds     of the run
    spec        tensors of the engine that will serve
    dependence  why rows may not share a run; "" where they may
    """

    feed: samples.Feed
    answers: samples.Feed
    origin: str
    seconds: float
    spec: EngineSpec
    dependence: str


def _try(
    content: bytes,
    graph: onnx.ModelProto,
    size: tuple[int, int] | None,
    given: Path | str | None,
    most: int,
    rows_open: bool,
) -> _Tried:
    """Run the graph as the server will, on the given inputs or on made-up ones.

    Args:
        most: rows that may share a run.
        rows_open: whether the file leaves the first side of every tensor open.
    Raises:
        ExportError: no inputs that the graph takes, or answers that are not as they should be.
    """
    inputs = samples.inputs_of(graph)
    if given is None:
        feeds, origin = samples.attempts(inputs, size or (256, 256)), "made up"
    else:
        feeds, origin = iter([samples.read_inputs(given, inputs)]), "given"
    engine = _served(content)
    try:
        feed, answers, seconds = _first_run(engine, feeds, origin)
        fixed = next((t for t in engine.spec.outputs if t.shape[:1] != (-1,)), None)
        if not rows_open:
            dependence = ""  # the file says so itself
        elif fixed is not None:
            dependence = f"output {fixed.name!r} has the shape {list(fixed.shape)} for any number of rows"
        else:
            dependence = rows.dependence(_within(engine, LONGEST), graph, inputs, feed, most)
        return _Tried(feed, answers, origin, seconds, engine.spec, dependence)
    finally:
        engine.close()


def _served(content: bytes) -> OnnxRuntimeEngine:
    """Load the engine as a server does: as a candidate that is promoted.  Raises ExportError."""
    try:
        candidate = OnnxRuntimeEngine.load(
            content, "fp32", EngineConfig(threads=2, concurrency=1), candidate=True
        )
        engine = candidate.with_serving_threads()
    except Exception as error:  # Refused, and what onnxruntime raises of its own
        raise ExportError(f"ONNX Runtime refuses the graph: {shorten(error, 300)}") from error
    if engine is not candidate:
        same = engine.spec.inputs == candidate.spec.inputs and engine.spec.outputs == candidate.spec.outputs
        candidate.close()
        if not same:
            engine.close()
            raise ExportError(
                "ONNX Runtime changes the graph's inputs or outputs when it optimises it, so it cannot be "
                "served; export it with IR version 4 or newer, without initialisers among the inputs"
            )
    return engine


def _first_run(
    engine: OnnxRuntimeEngine, feeds: Iterator[samples.Feed], origin: str
) -> tuple[samples.Feed, samples.Feed, float]:
    """The first feed that the graph takes and answers with finite numbers, the answers, and the seconds.

    Raises: ExportError for what was wrong with the first feed, where none is taken.
    """
    names = [tensor.name for tensor in engine.spec.outputs]
    begun = time.perf_counter()
    wrong: ExportError | None = None
    for feed in feeds:
        start = time.perf_counter()
        left = LONGEST - (start - begun)
        if left <= 0:
            break
        try:
            answers = engine.run(feed, names, limit=left)
        except Exception as error:  # onnxruntime raises types of its own
            if time.perf_counter() - start >= left:
                why = f"the graph did not answer within {LONGEST:g} s"
                raise ExportError(f"{why}: a loop without an end?") from error
            shapes = {name: list(array.shape) for name, array in feed.items()}
            remedy = "give --size where its sides are open, or inputs that it takes, --inputs FILE.npz"
            wrong = wrong or ExportError(
                f"the graph does not run on {origin.replace(' ', '-')} inputs {shapes}: "
                f"{shorten(error, 200)}" + (f"; {remedy}" if origin != "given" else "")
            )
            continue
        seconds = time.perf_counter() - start
        problem = _problem(engine.spec, answers)
        if not problem:
            return feed, answers, seconds
        instead = "; or give inputs that it takes, --inputs FILE.npz" if origin != "given" else ""
        wrong = wrong or ExportError(f"on {origin.replace(' ', '-')} inputs {problem}{instead}")
    raise wrong or ExportError("no inputs can be made up for the graph: give --inputs FILE.npz")


def _within(engine: OnnxRuntimeEngine, seconds: float) -> rows.Run:
    """The engine, all outputs; once `seconds` are over, every run raises."""
    names = [tensor.name for tensor in engine.spec.outputs]
    until = time.perf_counter() + seconds

    def run(feed: samples.Feed) -> samples.Feed:
        left = until - time.perf_counter()
        if left <= 0:
            raise TimeoutError(f"not checked within {seconds:g} s")
        return engine.run(feed, names, limit=left)

    return run


def _as_declared(outputs: Sequence[triton_config.Tensor], answers: samples.Feed) -> None:
    """Refuse answers that the file declares otherwise: config.pbtxt says what it declares.

    ONNX Runtime corrects some declarations by what it infers, so its own are not enough.
    Raises: ExportError.
    """
    for tensor in outputs:
        shape = answers[tensor.name].shape
        if len(shape) != len(tensor.shape) or any(
            declared not in (-1, got) for declared, got in zip(tensor.shape, shape, strict=True)
        ):
            raise ExportError(
                f"output {tensor.name!r} is declared as {list(tensor.shape)} and has the shape "
                f"{list(shape)}; correct the declared shape, or leave its sides open"
            )


def _problem(spec: EngineSpec, answers: samples.Feed) -> str:
    """What is wrong with answers, or ""."""
    for tensor in spec.outputs:
        answer = answers[tensor.name]
        if not tensor.fits(answer.shape):
            return (
                f"output {tensor.name!r} is declared as {list(tensor.shape)} and has the shape "
                f"{list(answer.shape)}; correct the declared shape, or leave its sides open"
            )
        if answer.dtype.kind == "f" and not np.isfinite(answer).all():
            return f"output {tensor.name!r} is not finite; the file is damaged or needs --size"
    return ""
