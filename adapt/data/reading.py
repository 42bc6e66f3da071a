"""How labels are read: which value is void, which colour is which class; and what becomes of bad pairs.

The options `--void`, `--palette` and `--skip-bad` of every command that reads labelled data are defined here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adapt.data.base import DataError, picture, read_label
from networks.images import upright

__all__ = ["Palette", "Problem", "Reading", "add_options", "reading_of"]

VOID = 255
VOID_NAMES = frozenset({"void", "ignore", "ignored", "unlabelled", "unlabeled", "none", "background/void"})
MOST_BYTES = 1 << 20  # of a palette file
_AT_START = re.compile(r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})(?:[\s,;]+(\S.*))?\Z")
_AT_END = re.compile(r"(\S.*?)[\s,;:]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})\Z")

#: A pair that cannot be used: its name, and why.
Problem = tuple[str, str]


class Palette:
    """Colours of a label picture and the class index of each.

    Args:
        colours: (red, green, blue), 0 to 255 -> class index 0 to 254, or 255 for void.
        source: what to call it in messages.
    """

    def __init__(self, colours: dict[tuple[int, int, int], int], source: str) -> None:
        self.source = source
        packed = {(r << 16) | (g << 8) | b: index for (r, g, b), index in colours.items()}
        self._keys = np.array(sorted(packed), np.int32)
        self._index = np.array([packed[int(key)] for key in self._keys], np.uint8)

    @classmethod
    def read(cls, path: Path, classes: Sequence[str] | None = None) -> Palette:
        """The palette of a text file: a colour and its class on each line, in either order.

        `128 64 128 road`, `road,128,64,128` and `128 64 128 0` mean the same where road is the first class;
        void (also ignore, unlabelled, 255) is no class.  Lines that begin with # and a header line
        name,r,g,b count for nothing.  A colour without a class has the number of its place in the file.

        Raises DataError for a line that is none of these, a class that `classes` lacks, or a colour twice.
        """
        try:
            if not path.is_file():
                raise DataError(f"palette {path} is no plain file: give a text file, or a label space")
            with path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise DataError(f"palette {path} has over {MOST_BYTES} bytes: is it a palette?")
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"palette {path} is no UTF-8 text: write a colour and its class a line") from None
        except OSError as error:
            raise DataError(f"palette {path} cannot be read ({error.strerror}): check the path") from error
        colours: dict[tuple[int, int, int], int] = {}
        names = {name.casefold(): i for i, name in enumerate(classes or ())}
        place = 0
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            start, end = _AT_START.match(text), _AT_END.match(text)
            if start is None and end is None:
                if not colours and not any(c.isdigit() for c in text):
                    continue  # the header
                raise DataError(
                    f"palette {path}, line {number}: {text[:60]!r} is no colour with its class; write "
                    "RED GREEN BLUE CLASS"
                )
            if start is not None:
                *rgb, name = start.groups()
            else:
                assert end is not None
                name, *rgb = end.groups()
            red, green, blue = (int(v) for v in rgb)
            if max(red, green, blue) > 255:
                raise DataError(f"palette {path}, line {number}: a channel goes from 0 to 255")
            where = f"palette {path}, line {number}"
            index = place if name is None else _class(name, names, len(classes or ()), where)
            place += 1
            colour = (red, green, blue)
            if colours.get(colour, index) != index:
                raise DataError(f"palette {path}, line {number}: colour {colour} has two classes")
            colours[colour] = index
        if not colours:
            raise DataError(f"palette {path} has no colour: write RED GREEN BLUE CLASS on each line")
        return cls(colours, str(path))

    @classmethod
    def named(cls, text: str, classes: Sequence[str] | None = None) -> Palette:
        """The palette of a file, or the colours of a label space (`networks.labels`; black is void)."""
        from networks.labels import SPACES

        if text in SPACES and not Path(text).exists():
            colours = {(0, 0, 0): VOID}
            colours |= {colour: i for i, colour in enumerate(SPACES[text].colours)}
            return cls(colours, text)
        return cls.read(Path(text), classes)

    def label(self, path: Path) -> np.ndarray:
        """uint8 [H,W] of a label picture in colours.  Transparent pixels are void.  Raises DataError."""
        with picture(path) as image:
            if image.mode not in ("RGB", "RGBA", "L", "P"):
                raise DataError(f"{path} has mode {image.mode}: a label in colours is RGB of 8 bits")
            pixels = np.asarray(upright(image).convert("RGBA")).astype(np.int32)
        packed = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
        place = np.minimum(np.searchsorted(self._keys, packed), len(self._keys) - 1)
        clear = pixels[..., 3] == 0
        strange = (self._keys[place] != packed) & ~clear
        if strange.any():
            y, x = (int(v) for v in np.argwhere(strange)[0])
            raise DataError(
                f"{path} holds colour {tuple(int(v) for v in pixels[y, x, :3])} (row {y}, column {x}), which "
                f"palette {self.source} lacks",
                "add it, as void if it is no class",
            )
        label = self._index[place]
        label[clear] = VOID
        return label


def _class(name: str, names: dict[str, int], count: int, where: str) -> int:
    text = name.strip().strip("\"'").casefold()
    if text in names:
        return names[text]
    if text in VOID_NAMES:
        return VOID
    if text.isdecimal() and len(text) <= 3 and (int(text) < (count or VOID) or int(text) == VOID):
        return int(text)
    known = ", ".join(names) or "0 to 254"
    raise DataError(f"{where}: class {name.strip()[:60]!r} is unknown; there are {known}, and void")


@dataclass(frozen=True)
class Reading:
    """How the labels of a set are read.

    void: label values that are no class, beside 255.  If 0 is among them, classes count from 1: label n + 1
    is class n.  palette: labels are pictures in these colours.  collect: frames and labels without their
    counterpart are noted in the set's `problems` in place of a DataError at the first.  colours: of the
    classes, if they are known: a palette PNG that has them in another order is refused.
    """

    void: tuple[int, ...] = ()
    palette: Palette | None = None
    collect: bool = False
    colours: tuple[tuple[int, int, int], ...] = ()
    table: np.ndarray | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if any(not 0 <= value <= VOID for value in self.void):
            raise DataError(f"void {list(self.void)}: a label value goes from 0 to 255")
        if self.void:
            table = np.arange(256, dtype=np.uint8)
            table[list(self.void)] = VOID
            if 0 in self.void:
                table = np.where(table == VOID, VOID, table - 1).astype(np.uint8)
            object.__setattr__(self, "table", table)

    def label(self, path: Path) -> np.ndarray:
        """uint8 [H,W] of class indices, 255 = none.  Raises DataError."""
        if self.palette is not None:
            return self.palette.label(path)
        label = read_label(path)
        stored, label = label, label if self.table is None else self.table[label]
        if self.colours:
            self._refuse_another_order(path, stored, label)
        return label

    def _refuse_another_order(self, path: Path, stored: np.ndarray, label: np.ndarray) -> None:
        """Programs that save few colours number them as they like: such an index is no class."""
        with picture(path) as image:
            palette = image.getpalette("RGB") if image.mode == "P" else None
        if not palette:
            return
        known = {colour: i for i, colour in enumerate(self.colours)}
        used, first = np.unique(stored, return_index=True)
        classes = label.reshape(-1)[first]
        # A short palette may lack the last colours.
        there = [3 * v for v in used.tolist() if 3 * v + 2 < len(palette)]
        shown = [(palette[v], palette[v + 1], palette[v + 2]) for v in there]
        pairs = [(int(c), known.get(s)) for c, s in zip(classes, shown, strict=False) if c != VOID]
        if len(pairs) > 1 and all(k is not None for _, k in pairs) and any(c != k for c, k in pairs):
            raise DataError(
                f"{path} has the colours of the classes, but its indices are not those of the classes",
                "its colours are the labels: give --palette with the label space",
            )

    def refuse_for(self, kind: str) -> None:
        """Raise DataError if a void value or a palette was given for a set that has its own."""
        if self.void or self.palette is not None:
            raise DataError(
                f"{kind} has label values of its own: --void and --palette are for folder: and camvid: sets"
            )


def add_options(p: argparse.ArgumentParser, *, skip: bool = True) -> None:
    """`--void`, `--palette` and `--skip-bad`, the same for every command."""
    p.add_argument(
        "--void",
        metavar="N",
        type=_value,
        action="append",
        default=[],
        help="label value that is no class, beside 255; 0: classes count from 1 (folder and camvid; repeat)",
    )
    p.add_argument(
        "--palette",
        metavar="FILE",
        help="labels are RGB pictures; FILE has RED GREEN BLUE CLASS on each line, or is a label space",
    )
    if skip:
        p.add_argument(
            "--skip-bad", action="store_true", help="leave out pairs that cannot be used, and list them"
        )


def reading_of(arguments: argparse.Namespace, classes: Sequence[str] | None = None) -> Reading:
    """What the options say.  classes: names that a palette file may use.  Raises DataError."""
    if arguments.void and arguments.palette:
        raise DataError("--void and --palette exclude each other: call the colour of no class void")
    from networks.labels import SPACES

    palette = Palette.named(arguments.palette, classes) if arguments.palette else None
    spaces = (space.colours for space in SPACES.values() if space.classes == tuple(classes or ()))
    return Reading(tuple(arguments.void), palette, collect=True, colours=next(spaces, ()))


def _value(text: str) -> int:
    if not text.isdecimal() or len(text) > 3 or int(text) > VOID:
        raise argparse.ArgumentTypeError(f"{text!r} is no label value: give 0 to 255")
    return int(text)
