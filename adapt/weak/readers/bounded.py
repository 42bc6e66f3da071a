"""Files of other programs, read within bounds: their size, depth and number of elements.

A DTD is refused, because entities make a small file a large one.  Standard library alone.
"""

from __future__ import annotations

import json
import os
import stat
import xml.parsers.expat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapt.weak.marks import WeakError

__all__ = ["MOST_BYTES", "Element", "number", "parse_xml", "read_bytes", "read_document"]

MOST_BYTES = 64 << 20
MOST_DEPTH = 32
MOST_ELEMENTS = 2_000_000


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a plain file of at most `most` bytes.

    Raises:
        WeakError: there is none, it is no plain file, too large, or a zip.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
        with open(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise WeakError(f"marks {path}: it is no plain file; name the exported file")
            content = file.read(most + 1)
    except OSError as error:
        raise WeakError(f"marks {path}: {error.strerror}; check the path and its permissions") from error
    if len(content) > most:
        raise WeakError(f"marks {path}: it has over {most} bytes; export fewer frames per file")
    if content[:2] == b"PK":
        raise WeakError(f"marks {path}: it is a zip; unpack it and name the annotation file in it")
    return content


def read_document(path: Path) -> Any:
    """The content of a JSON file; the same key twice in one object is an error.

    Raises WeakError.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise WeakError(f"marks {path}: {twice!r} is there twice in one object; keep one of them")
        return out

    content = read_bytes(path)
    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=once)
        if b"\\u" in content:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise WeakError(f"marks {path}: it is nested too deep; export it again") from None
    except WeakError:
        raise
    except UnicodeError:
        raise WeakError(f"marks {path}: it is no UTF-8 text; save it as UTF-8") from None
    except ValueError as error:
        raise WeakError(f"marks {path}: it is no JSON ({error}); export it again") from None
    return found


@dataclass
class Element:
    """An XML element: name, attributes, text, children."""

    name: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, name: str) -> Iterator[Element]:
        """Its children of that name."""
        return (c for c in self.children if c.name == name)

    def find(self, *way: str) -> Element | None:
        """The first descendant on that way, or None."""
        here: Element | None = self
        for name in way:
            here = None if here is None else next(here.all(name), None)
        return here

    def word(self, *way: str) -> str:
        """The text of the first descendant on that way, or ""."""
        found = self.find(*way)
        return "" if found is None else found.text.strip()


def parse_xml(path: Path) -> Element:
    """The root element of an XML file.

    Raises:
        WeakError: it is no XML, has a DTD, or goes over the bounds.
    """
    content = read_bytes(path)
    root = Element("", {})
    stack = [root]
    count = 0

    def refuse(*_: Any) -> None:
        raise WeakError(f"marks {path}: it has a DTD, which may define entities; delete the DOCTYPE")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if len(stack) > MOST_DEPTH:
            raise WeakError(f"marks {path}: it is nested over {MOST_DEPTH} deep; export it again")
        if count > MOST_ELEMENTS:
            raise WeakError(f"marks {path}: it has over {MOST_ELEMENTS} elements; export fewer frames")
        element = Element(name, attributes)
        stack[-1].children.append(element)
        stack.append(element)

    def end(_: str) -> None:
        stack.pop()

    def text(data: str) -> None:
        stack[-1].text += data

    parser = xml.parsers.expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    try:
        parser.Parse(content, True)
    except xml.parsers.expat.ExpatError as error:
        raise WeakError(f"marks {path}: it is no XML ({error}); export it again") from None
    except (LookupError, UnicodeError) as error:
        raise WeakError(f"marks {path}: its encoding is unknown ({error}); save it as UTF-8") from None
    return root.children[0]


def number(value: Any, who: str) -> float:
    """A finite number of a text or a JSON value.

    Raises WeakError that names `who`.
    """
    try:
        if isinstance(value, bool) or value is None or (isinstance(value, str) and "_" in value):
            raise ValueError
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise WeakError(f"{who}: {str(value)[:40]!r} is no number; export it again") from None
    if found != found or abs(found) > 1e9:
        raise WeakError(f"{who}: {str(value)[:40]!r} is no coordinate; export it again")
    return found
