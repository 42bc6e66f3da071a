"""Local functions of an ONNX file, counted before anything expands them.

A file of a few kilobytes can describe a function that calls itself, or thirty functions of which each calls
the next one twice: onnx and ONNX Runtime would replace every call by its body, 2^30 nodes in all.  Here the
calls are only counted.  Knows the messages of ONNX alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx

from export.errors import ExportError

#: Nodes of a graph once every local function is replaced by its body; the largest networks have 10,000s.
MOST_NODES = 1_000_000

Key = tuple[str, str, str]


def check_functions(model: onnx.ModelProto) -> None:
    """Refuse functions that call themselves or that expand into too many nodes.

    Takes time in proportion to the size of the file.  Raises: ExportError.
    """
    bodies = {_key(function): _calls(function.node) for function in model.functions}
    if len(bodies) != len(model.functions):
        raise ExportError("two local functions of the file have one name; rename one of them")
    sizes = _expanded(bodies)
    count, calls = _calls(model.graph.node)
    total = count + sum(number * sizes.get(key, 0) for key, number in calls.items())
    if total > MOST_NODES:
        shown = f"{total:,}" if total < 10**12 else "more than 10^12"
        raise ExportError(
            f"the file's local functions expand into {shown} nodes; {MOST_NODES:,} are read: "
            "export the graph without local functions"
        )


def calls_of(model: onnx.ModelProto) -> set[Key]:
    """Names of the local functions, as (domain, name, overload)."""
    return {_key(function) for function in model.functions}


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Every node, those inside branches and loops included; no function is expanded."""
    waiting = [iter(nodes)]
    while waiting:
        node = next(waiting[-1], None)
        if node is None:
            waiting.pop()
            continue
        yield node
        waiting += [iter(graph.node) for a in node.attribute for graph in (a.g, *a.graphs) if graph.node]


def key_of(node: onnx.NodeProto) -> Key:
    """What a node calls, in the terms of `calls_of`."""
    return _domain(node.domain), node.op_type, getattr(node, "overload", "")


def _key(function: onnx.FunctionProto) -> Key:
    return _domain(function.domain), function.name, getattr(function, "overload", "")


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _calls(nodes: Iterable[onnx.NodeProto]) -> tuple[int, Counter[Key]]:
    """(number of nodes, how often each operator or function is named in them)."""
    calls = Counter(map(key_of, nodes_of(nodes)))
    return calls.total(), calls


def _expanded(bodies: dict[Key, tuple[int, Counter[Key]]]) -> dict[Key, int]:
    """Count the nodes of each function with its calls expanded.  Raises ExportError for a cycle."""
    open_calls = {key: {k for k in calls if k in bodies} for key, (_, calls) in bodies.items()}
    callers: dict[Key, list[Key]] = {key: [] for key in bodies}
    for key, called in open_calls.items():
        for one in called:
            callers[one].append(key)
    ready = [key for key, called in open_calls.items() if not called]
    sizes: dict[Key, int] = {}
    while ready:
        key = ready.pop()
        count, calls = bodies[key]
        # Bounded, so that a chain of thousands of doublings stays a number of ordinary size.
        total = count + sum(number * sizes[k] for k, number in calls.items() if k in sizes)
        sizes[key] = min(total, 10**15)
        for caller in callers[key]:
            open_calls[caller].discard(key)
            if not open_calls[caller]:
                ready.append(caller)
    if left := sorted(set(bodies) - set(sizes)):
        name = "::".join(left[0][:2])
        raise ExportError(
            f"local function {name!r} calls itself, directly or through another; "
            "export the graph without local functions"
        )
    return sizes
