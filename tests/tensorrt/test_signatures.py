"""The reader of pybind11's signature lines, on lines as pybind11 writes them."""

from __future__ import annotations

import tomllib

from runtime.engines.tensorrt.library import OLDEST
from tools.trt_stubs.__main__ import BINDINGS, ROOT
from tools.trt_stubs.signatures import Parameter, from_docstring, parse, split_top


def test_split_ignores_brackets_quotes_and_arrows() -> None:
    assert split_top("a: list[int, str], b: str = ',', c: E = <E.A: 0>, d") == [
        "a: list[int, str]",
        "b: str = ','",
        "c: E = <E.A: 0>",
        "d",
    ]
    assert split_top("f: Callable[[int], None] -> x") == ["f: Callable[[int], None] -> x"]
    assert split_top("") == []


def test_plain_signature() -> None:
    signature = parse("refit(self: m.Refitter, name: str, size: typing.SupportsInt = 0) -> bool", "refit")
    assert signature is not None
    assert signature.returns == "bool"
    size = Parameter("size", "typing.SupportsInt", "0")
    assert signature.parameters[1:] == (Parameter("name", "str"), size)


def test_enum_default_and_unnamed_arguments() -> None:
    signature = parse("(arg0: m.C, arg1: collections.abc.Sequence[int]) -> None")
    assert signature is not None
    assert [p.positional for p in signature.parameters] == [True, True]
    made = parse("make(self: m.C, kind: m.K = <K.A: 0>) -> m.C", "make")
    assert made is not None
    assert made.parameters[1].default == "<K.A: 0>"


def test_keyword_as_a_name_becomes_positional() -> None:
    signature = parse("run(self: m.C, in: int) -> int", "run")
    assert signature is not None
    assert signature.parameters[1] == Parameter("in_", "int", "", True)


def test_overloads_are_numbered() -> None:
    doc = (
        "build(*args, **kwargs)\nOverloaded function.\n\n1. build(self: m.B, n: m.N) -> m.H\n\n    Text.\n\n"
        "2. build(self: m.B, n: m.N, text: object) -> m.H\n"
    )
    found = from_docstring(doc, "build")
    assert [len(signature.parameters) for signature in found] == [2, 3]


def test_prose_is_not_a_signature() -> None:
    assert from_docstring("Build the thing.\n\nbuild(it) twice.", "build") == []
    assert from_docstring(None, "build") == []
    assert parse("build(self: m.B", "build") is None


def test_the_oldest_release_that_we_promise_is_among_those_that_are_checked() -> None:
    """pyproject.toml, the guard of the runtime and the stubs name the same one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["tensorrt"]
    (wanted,) = (text for text in extra if text.startswith("tensorrt"))
    oldest = ".".join(map(str, OLDEST))
    assert wanted.startswith(f"tensorrt>={oldest},<12")
    assert BINDINGS[oldest].startswith(f"{oldest}.")
    checked = sorted(tuple(map(int, version.split(".")[:2])) for version in BINDINGS.values())
    assert checked[0] == OLDEST
    assert (11, 0) in checked
