"""pybind11's docstring signatures as data: text in, `Signature` out.  Knows nothing of TensorRT.

pybind11 puts `name(self: pkg.mod.Class, x: typing.SupportsInt = 0) -> bool` in the first line of a bound
function's docstring; an overloaded one starts with `name(*args, **kwargs)` and numbers its signatures.
A property's getter and setter have the same without the name.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass, replace

_OPEN, _CLOSE = "([{<", ")]}>"


@dataclass(frozen=True)
class Parameter:
    """One parameter.  `default` is "" where there is none; `positional` means it has no usable name."""

    name: str
    annotation: str = ""
    default: str = ""
    positional: bool = False


@dataclass(frozen=True)
class Signature:
    """One overload: parameters (with self) and the return annotation."""

    parameters: tuple[Parameter, ...]
    returns: str

    def without_self(self) -> Signature:
        return replace(self, parameters=self.parameters[1:])


def split_top(text: str, separator: str = ",") -> list[str]:
    """`text` cut at the separators that stand outside brackets and quotes, each part stripped."""
    parts, depth, quote, current = [], 0, "", ""
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _OPEN:
            depth += 1
        elif character in _CLOSE and not (character == ">" and text[i - 1 : i] == "-"):
            depth -= 1
        if character == separator and depth == 0 and not quote:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() or parts else []


def _parameter(text: str) -> Parameter:
    head, *default = split_top(text, "=")
    name, _, annotation = head.partition(":")
    name = name.strip()
    positional = bool(re.fullmatch(r"arg\d+", name)) or keyword.iskeyword(name)
    return Parameter(
        name + "_" if keyword.iskeyword(name) else name,
        annotation.strip(),
        default[0] if default else "",
        positional,
    )


def parse(line: str, name: str = "") -> Signature | None:
    """The signature written in one line, or None where the line is not one.  `name` "" for properties."""
    line = line.strip()
    if not line.startswith(f"{name}("):
        return None
    depth = 0
    for end in range(len(name), len(line)):
        depth += (line[end] == "(") - (line[end] == ")")
        if depth == 0:
            break
    else:
        return None
    tail = line[end + 1 :].strip()
    if not tail.startswith("->"):
        return None
    parameters = [_parameter(part) for part in split_top(line[len(name) + 1 : end]) if part not in ("/", "*")]
    return Signature(tuple(parameters), tail.removeprefix("->").strip())


def from_docstring(doc: str | None, name: str) -> list[Signature]:
    """All overloads in a function's docstring; empty where pybind11 wrote none."""
    lines = (doc or "").splitlines()
    if not lines:
        return []
    if lines[0].startswith(f"{name}(*args, **kwargs)"):
        lines = [match[1] for line in lines if (match := re.match(rf"\d+\. ({re.escape(name)}\(.*)", line))]
        return [signature for line in lines if (signature := parse(line, name))]
    first = parse(lines[0], name)
    return [first] if first else []
