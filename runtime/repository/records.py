"""Records: small JSON files and lines that outlive the server, read as if a stranger had written them.

JSON says more than a record may: two values of one key, NaN, numbers that no message can carry, text that is
no Unicode.  And a file may be larger than the memory.  Knows files and JSON only.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

LARGEST = 1 << 20  # bytes of a record that is one JSON object
LARGEST_HISTORY = 64 << 20  # bytes of a history; of a larger one its two ends are read
_VERSIONS = 10**18  # the repository names no higher one


def parse(content: str | bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Raises ValueError for what is no JSON, and for what JSON does not forbid: a key that is there twice, a
    whole number beyond 64 bits with a sign, half of a surrogate pair; with `finite` also NaN and Infinity.
    """
    try:
        value = json.loads(
            content,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite if finite else None,
            parse_constant=_no_constant if finite else None,
        )
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("it has a key twice")
    return value


def _whole(text: str) -> int:
    value = int(text) if len(text) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError("it has a whole number beyond 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it has a number that is not finite")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"it has the number {text}")


def unicode(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which neither a file nor a message can carry."""
    return text.encode(errors="replace").decode()


# -- files ---------------------------------------------------------------------------


def open_plain(path: Path, *, follow: bool = False) -> BinaryIO:
    """A plain file, and no pipe or device, on which a reader would wait for ever.  `follow`: or a link to
    one.  Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file")
    return open(descriptor, "rb")


def read(path: Path, limit: int = LARGEST, *, follow: bool = False) -> bytes:
    """The content of a plain file.  Raises OSError, EFBIG for one of more than `limit` bytes."""
    with open_plain(path, follow=follow) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {_size(limit)}")
    return content


def read_ends(path: Path, limit: int = LARGEST_HISTORY) -> bytes:
    """The content of a file of lines; of one with more than `limit` bytes its first and last lines, of half
    as many bytes each.  Raises OSError.
    """
    with open_plain(path, follow=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            return file.read(limit)
        head = file.read(limit // 2)
        file.seek(size - limit // 2)
        return head + b"\n" + file.read(limit // 2)


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count} bytes"


# -- what is live --------------------------------------------------------------------


def number(value: Any) -> int:
    """A version or generation; 0 for anything that is none."""
    return value if type(value) is int and 0 < value < _VERSIONS else 0


def live(value: Any) -> dict[str, Any]:
    """The fields of a live.json that have the types that its readers count on; the others are left out."""
    if not isinstance(value, dict):
        return {}
    return {key: field for key, field in value.items() if _sound(key, field)}


def _sound(key: str, value: Any) -> bool:
    if key in ("live", "previous", "generation", "last"):
        return number(value) > 0
    if key in ("pinned", "frozen", "unloaded"):
        return isinstance(value, bool)
    if key in ("frozen_reason", "group"):
        return isinstance(value, str)
    if key in ("members", "previous_members"):
        return isinstance(value, dict) and all(number(version) for version in value.values())
    return True


def transition(line: str | bytes) -> dict[str, Any] | None:
    """A line of a history that has the types that its readers count on; None for any other.  Text that is no
    Unicode is mended: the line may say that a version was rolled back.
    """
    if isinstance(line, bytes):
        line = line.decode(errors="replace")
    try:
        entry = parse(line)
    except UnicodeEncodeError:
        entry = _mended(json.loads(line))
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    when, version, detail = entry.get("time", 0.0), entry.get("version", 0), entry.get("detail")
    numbers = type(when) in (int, float) and type(version) is int and 0 <= version < _VERSIONS
    words = all(isinstance(entry.get(key, ""), str) for key in ("state", "check", "reason"))
    return entry if numbers and words and (detail is None or isinstance(detail, dict)) else None


def given(entry: dict[str, Any]) -> int:
    """The number of a line's version, where the line shows that a version had it; else 0.  Whoever may submit
    can name any number, and a number is given by publishing alone.
    """
    state = entry.get("state")
    asked = state == "SUBMITTED" or (state == "REJECTED" and entry.get("check") == "manifest")
    return 0 if asked else number(entry.get("version"))


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return unicode(value)
    if isinstance(value, list):
        return [_mended(each) for each in value]
    if isinstance(value, dict):
        return {unicode(key): _mended(each) for key, each in value.items()}
    return value


def deciding(entries: list[dict[str, Any]], versions: set[int]) -> set[int]:
    """Returns the indices of the lines that must stay when a history is shortened.

    Per existing version: the last line of each state and check.  Of all: the last that was live, the highest
    number (no number is given twice) and the last one with pin and freeze.
    """
    last: dict[Any, int] = {}
    highest = max((given(entry) for entry in entries), default=0)
    for n, entry in enumerate(entries):
        version, state, detail = entry.get("version", 0), entry.get("state"), entry.get("detail")
        if version in versions and state != "NOTE":
            last[version, state, entry.get("check")] = n
        if state == "LIVE":
            last["live"] = n
        if given(entry) == highest:
            last["highest"] = n
        if state == "NOTE" and detail and "pinned" in detail:
            last["flags"] = n
    return set(last.values())
