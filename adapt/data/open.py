"""Opens the data set that a description names."""

from __future__ import annotations

from collections.abc import Callable

from adapt.data.base import DataError, Dataset, Unlabelled
from adapt.data.reading import Reading

__all__ = ["kinds", "open_dataset"]


def _camvid(text: str, labels: bool, reading: Reading) -> Dataset:
    from adapt.data.camvid import CamVid

    root, _, name = text.rpartition(":")
    if not root:
        raise DataError(
            f"camvid:{text} names no list: write camvid:ROOT:LIST, such as camvid:data/camvid:dusk_eval"
        )
    return CamVid(root, name, labels=labels, reading=reading)


def _folder(text: str, labels: bool, reading: Reading) -> Dataset:
    from adapt.data.folder import Folder

    return Folder(text, labels=labels, reading=reading)


def _street(text: str, labels: bool, reading: Reading) -> Dataset:
    from adapt.data.rendered import Rendered

    reading.refuse_for("street")

    parts = text.split(":")
    if not 1 <= len(parts) <= 3:
        raise DataError(f"street:{text}: write street:DOMAIN[:COUNT[:FIRST_SEED]]")
    try:
        rendered = Rendered(parts[0], *(int(part) for part in parts[1:]))
        return rendered if labels else Unlabelled(rendered)
    except ValueError as error:
        raise DataError(f"street:{text}: {error}; write street:DOMAIN[:COUNT[:FIRST_SEED]]") from error


def _driving(kind: str) -> Callable[[str, bool, Reading], Dataset]:
    def opener(text: str, labels: bool, reading: Reading) -> Dataset:
        from adapt.data.driving import SETS, Driving

        reading.refuse_for(kind)
        if not SETS[kind].needs_split:
            return Driving(kind, text, labels=labels, reading=reading)
        root, _, split = text.rpartition(":")
        return Driving(kind, root or text, split if root else "", labels=labels, reading=reading)

    return opener


_OPENERS: dict[str, Callable[[str, bool, Reading], Dataset]] = {
    "camvid": _camvid,
    "folder": _folder,
    "street": _street,
    **{kind: _driving(kind) for kind in ("acdc", "bdd100k", "cityscapes", "darkzurich", "gta5", "synthia")},
}


def kinds() -> list[str]:
    """The words `open_dataset` knows."""
    return sorted(_OPENERS)


def open_dataset(text: str, *, labels: bool = True, reading: Reading | None = None) -> Dataset:
    """The data set a description names: camvid:ROOT:LIST, folder:PATH, street:DOMAIN[:COUNT[:FIRST_SEED]],
    and the published sets of `adapt.data.driving`, such as cityscapes:ROOT:SPLIT or gta5:ROOT.

    With labels=False no label is read or asked for: what adaptation wants.  reading: which label values are
    void, which colours are which class, and whether bad pairs are noted in place of an error.

    Raises DataError with the remedy.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in _OPENERS:
        raise DataError(
            f"{text!r} describes no data set: write KIND:WHERE with KIND one of {', '.join(kinds())}"
        )
    return _OPENERS[kind](rest, labels, reading or Reading())
