"""No test depends on how fast the machine is, or on how busy.

Read from the source of every test.  Two things are refused: an assertion that compares elapsed time with
a number of seconds, and a wait that gives up so soon that a busy machine fails it.  A test that needs
slowness makes it relative to what it measured, or has a clock of its own (`tests/runtime/costs.py`).  A test
that needs an event waits for it with `tests.waits.until`, which ends as soon as the event comes.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
Rule = Callable[[ast.AST], Iterator[int]]  # the lines that it refuses
CLOCKS = {"monotonic", "perf_counter", "time", "monotonic_ns", "perf_counter_ns", "time_ns"}
SHORT = 60.0  # seconds: a wait for an event lasts at least as long, and should be tests.waits.PATIENCE
WAITS = {"wait", "join", "result", "communicate", "drain", "flush", "wait_ready", "wait_closed"}

CALLS = {"infer", "infer_tensors", "run", "check_output", "urlopen"}  # that take a `timeout`

# (file, line): why it is right on every machine.
ALLOWED = {
    ("adapt/test_run.py", "stop.wait(0.05)"): "the pause between two frames of a camera",
    ("runtime/adapters.py", "self._thread.join(0.5)"): "its stream is closed next, ended or not",
    (
        "runtime/client/test_client.py",
        'lambda: c.infer("road", np.zeros((160, 160, 3), np.uint8), timeout=0.3),',
    ): ("raises, because the peer never says a word"),
    ("runtime/scenarios/test_faults.py", "watch.join(0.5)"): "the thread cannot end before the test lets it",
    ("tensorrt/test_server.py", "while not self.stopping.wait(0.01):"): "the pause between two frames",
    ("tensorrt/test_builder.py", "others[0].join(0.2)"): "the thread cannot end before the test lets it",
    ("tensorrt/test_contexts.py", "thread.join(0.05)"): "the thread cannot end before the test lets it",
    ("tensorrt/test_cuda.py", "one.join(0.05)"): "the thread cannot end before the test lets it",
    ("tensorrt/test_cuda_gate.py", "thread.join(0.05)"): "the thread cannot end before the test lets it",
    ("tensorrt/test_cuda_shm.py", "thread.join(0.05)"): "the thread cannot end before the test lets it",
    ("tensorrt/test_runner.py", "closing.join(0.05)"): "the thread cannot end before the test lets it",
}


def is_clock(node: ast.AST) -> bool:
    """Whether the expression reads a clock: time.monotonic(), perf_counter(), …"""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    of_time = owner is None or (isinstance(owner, ast.Name) and owner.id == "time")
    return of_time and name in CLOCKS and not node.args


def timed(node: ast.AST, names: set[str]) -> bool:
    """Whether a duration is in the expression: a difference with a clock in it, or a name that holds one."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in names:
            return True
        minus = isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub)
        if minus and any(map(is_clock, ast.walk(part))):
            return True
    return False


def number(node: ast.AST) -> float | None:
    """The value of a constant expression of numbers, or None."""
    if any(not isinstance(each, CONSTANT) for each in ast.walk(node)):
        return None
    try:
        value = eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}})  # type: ignore[arg-type]
    except Exception:
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


CONSTANT = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)


def durations(function: ast.AST) -> set[str]:
    """Names that are given a duration anywhere in the function."""
    found: set[str] = set()
    for _ in range(3):  # a duration may be passed on
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if timed(node.value, found):
                    found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


def elapsed(tree: ast.AST) -> Iterator[int]:
    """Lines that assert how long something took, in seconds."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        names = durations(function)
        for node in ast.walk(function):
            if not isinstance(node, ast.Assert):
                continue
            for compared in (n for n in ast.walk(node.test) if isinstance(n, ast.Compare)):
                sides = [compared.left, *compared.comparators]
                if any(timed(side, names) for side in sides) and any(number(s) is not None for s in sides):
                    yield node.lineno


def impatient(tree: ast.AST) -> Iterator[int]:
    """Lines that wait for an event and give up after less than SHORT seconds.

    What is expected to give up may do so soon: a call under `pytest.raises` is let through.
    """
    refused: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With | ast.AsyncWith) and "pytest.raises" in map(_name, node.items):
            refused.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
            left, right = node.value.left, node.value.right
            if isinstance(node.value.op, ast.Add) and is_clock(left) and _short(right):
                yield node.lineno
        if not isinstance(node, ast.Call) or node in refused or not isinstance(node.func, ast.Attribute):
            continue
        named = [k.value for k in node.keywords if k.arg == "timeout"]
        waits = [*named, *node.args[:1]] if node.func.attr in WAITS else []
        if any(_short(limit) for limit in (named if node.func.attr in CALLS else waits)):
            yield node.lineno


def _name(item: ast.withitem) -> str:
    call = item.context_expr
    return ast.unparse(call.func) if isinstance(call, ast.Call) else ""


def _short(node: ast.AST) -> bool:
    limit = number(node)
    return limit is not None and 0 < limit < SHORT


@functools.cache
def parsed(path: Path) -> tuple[list[str], ast.AST]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


@functools.cache
def lines(rule: Rule, path: Path) -> list[tuple[str, str]]:
    """(file, line) of what a rule refuses in a file of tests."""
    text, tree = parsed(path)
    where = path.relative_to(HERE).as_posix()
    return [(where, text[n - 1].strip()) for n in sorted(set(rule(tree)))]


@pytest.mark.parametrize("rule", [elapsed, impatient])
def test_no_test_depends_on_the_speed_of_the_machine(rule: Rule) -> None:
    found = [line for path in sorted(HERE.rglob("*.py")) for line in lines(rule, path)]
    new = [f"{where}: {line}" for where, line in found if (where, line) not in ALLOWED]
    assert not new, f"{rule.__doc__}\n" + "\n".join(new)


def test_nothing_is_allowed_that_is_not_there() -> None:
    paths, rules = list(HERE.rglob("*.py")), (elapsed, impatient)
    assert set(ALLOWED) <= {line for path in paths for rule in rules for line in lines(rule, path)}


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ("begun = time.monotonic(); work(); assert time.monotonic() - begun < 5", True),
        ("begun = perf_counter(); work(); spent = perf_counter() - begun; assert spent < 0.5", True),
        ("a = clock(); spent = time.time() - a; ms = 1e3 * spent; assert 10 <= ms", True),
        ("assert abs(seen.time - time.time()) < 30", True),
        ("begun = monotonic(); assert not monotonic() - begun > 2 * 60", True),
        ("spent = time.monotonic() - begun; assert count <= 40 + 20 * spent", False),  # what was measured
        ("assert begun <= seen.time <= time.time()", False),
        ("end = time.monotonic() + 120\nwhile not done(): assert time.monotonic() < end", False),
        ("clock.now += 5; assert meter.spent() < 5", False),
    ],
)
def test_what_counts_as_elapsed_time(body: str, refused: bool) -> None:
    tree = ast.parse("def test():\n" + textwrap.indent(body, "    "))
    assert bool(list(elapsed(tree))) == refused


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ("end = time.monotonic() + 5", True),
        ("assert event.wait(10)", True),
        ("thread.join(timeout=20)", True),
        ("subprocess.run(command, timeout=30)", True),
        ("client.infer('road', frame, timeout=10)", True),
        ("with pytest.raises(RpcError):\n    client.infer('road', frame, timeout=0.2)", False),
        ("assert event.wait(PATIENCE)", False),
        ("', '.join(words); os.path.join('a', 'b'); thread.join()", False),
        ("Config(timeout=0.3)", False),
    ],
)
def test_what_counts_as_a_short_wait(body: str, refused: bool) -> None:
    assert bool(list(impatient(ast.parse(body)))) == refused
