"""``python -m adapt.view``: rounds and live frames in Rerun, on a timeline (extra ``view``: rerun-sdk).

For people who would rather look than read: frames, labels, confidence, edges, versions and the gate's
decisions, by round or by time.  Writes a recording (``--save``), or shows it in the viewer.  Reads what
rounds and the service leave; changes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapt.data.base import BROKEN
from common.cli import run_command
from common.files import read_json

__all__ = ["Recording", "ViewError", "live", "main", "rounds"]

EPILOG = """\
examples:
  # all rounds of a work folder, as a recording to open with `rerun rounds.rrd`
  python -m adapt.view rounds adapt-road --save rounds.rrd
  # 200 frames of the live service, with its answers
  python -m adapt.view live --server 127.0.0.1:8001 --model road --frames 200 --save live.rrd
  # the same in the viewer's window
  python -m adapt.view live --server 127.0.0.1:8001 --model road

exit codes: 0 everything was recorded, 1 refused or failed (one line on stderr says why), 2 wrong usage
"""


class ViewError(Exception):
    """Nothing can be shown.  One line: thing, reason, remedy."""


def _rerun() -> Any:
    try:
        import rerun
    except ImportError as error:
        raise ViewError(f"rerun-sdk is not installed ({error}): pip install 'roadworthy[view]'") from error
    return rerun


class Recording:
    """A Rerun recording with a place for each thing a person looks at.

    Args:
        name: of the application in the viewer.
        save: file to write; None opens the viewer.
    """

    def __init__(self, name: str, save: Path | None) -> None:
        self.rerun = _rerun()
        self.stream = self.rerun.RecordingStream(f"roadworthy-{name}")
        if save is None:
            self.stream.spawn()
        else:
            self.stream.save(str(save))

    def classes(self, path: str, names: list[str], colours: list[list[int]]) -> None:
        """Names and colours of label maps below `path`."""
        described = [
            self.rerun.AnnotationInfo(id=i, label=name, color=tuple(int(v) for v in colour[:3]))
            for i, (name, colour) in enumerate(zip(names, colours, strict=True))
        ]
        self.stream.log(path, self.rerun.AnnotationContext(described), static=True)

    def at(self, **times: float | int) -> None:
        """Where on the timelines what follows belongs: seconds since 1970 for `time`, a count for others."""
        for name, value in times.items():
            if name == "time":
                self.stream.set_time(name, timestamp=float(value))
            else:
                self.stream.set_time(name, sequence=int(value))

    def frame(self, path: str, frame: np.ndarray) -> None:
        """uint8 [H,W,3]."""
        self.stream.log(path, self.rerun.Image(frame))

    def labels(self, path: str, labels: np.ndarray) -> None:
        """uint8 [H,W] class indices."""
        self.stream.log(path, self.rerun.SegmentationImage(labels))

    def grey(self, path: str, image: np.ndarray) -> None:
        """uint8 [H,W]: confidence, or the edges of a class."""
        self.stream.log(path, self.rerun.Image(image, color_model="L"))

    def number(self, path: str, value: float) -> None:
        self.stream.log(path, self.rerun.Scalars(float(value)))

    def line(self, path: str, text: str, *, bad: bool = False) -> None:
        level = self.rerun.TextLogLevel.WARN if bad else self.rerun.TextLogLevel.INFO
        self.stream.log(path, self.rerun.TextLog(text, level=level))

    def close(self) -> None:
        """Everything is on disk or with the viewer afterwards."""
        self.stream.flush()
        self.stream.disconnect()


def _picture(path: Path) -> np.ndarray | None:
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except BROKEN:
        return None


def rounds(workdir: Path, recording: Recording) -> int:
    """Every finished round of a work folder; gives how many.  Raises ViewError where there is none."""
    # Not those that the loop has put aside (round-0002.lost-…).
    found = (p.parent for p in workdir.glob("round-*/report.json"))
    folders = sorted(p for p in found if p.name.removeprefix("round-").isdigit())
    for number, folder in enumerate(folders, 1):
        report = read_json(folder / "report.json")
        file = folder / "loop.json"
        loop = read_json(file) if file.is_file() else {}
        recording.at(round=number)
        names = [str(n) for n in report.get("classes") or []]
        if names:
            recording.classes("/", names, report["colours"])
        for j in range(8):
            for kind in ("frame", "learnt", "before", "after", "label"):
                picture = _picture(folder / "pictures" / f"{j}-{kind}.png")
                if picture is None:
                    continue
                show = recording.frame if picture.ndim == 3 else recording.labels
                show(f"round/{j}/{kind}", picture)
        for check in report.get("gate", {}).get("checks", []):
            recording.number(f"gate/{check['name']}", float(check["value"]))
            recording.line("gate", f"{check['name']}: {check['reason']}", bad=not check["passed"])
        for key, stage in (report.get("stages") or {}).items():
            for name, lam in zip(names, stage.get("lambda") or [], strict=False):
                recording.at(round=number, portion=int(100 * stage["portion"]))
                recording.number(f"lambda/{_entity(name)}", float(lam))
            measures = stage.get("measures") or {}
            for what in ("flip", "confidence", "source", "translated"):
                if what in measures:
                    recording.number(f"measures/{key}/{what}", float(measures[what]))
        for event in loop.get("events") or []:
            recording.at(round=number, time=float(event.get("time") or 0))
            words = " ".join(str(event.get(k) or "") for k in ("state", "check", "reason")).strip()
            bad = event.get("state") == "REJECTED"
            recording.line("swap", f"version {loop.get('version', '')}: {words}", bad=bad)
        if loop.get("version"):
            recording.number("version", float(loop["version"]))
    if not folders:
        raise ViewError(f"{workdir} holds no finished round: give the --workdir of adapt.run")
    return len(folders)


def _entity(name: str) -> str:
    """A name as one part of an entity path."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name) or "_"


def live(tapped: Iterator[Any], recording: Recording, most: int) -> int:
    """Frames of the service's tap with the answers they got; gives how many."""
    shown = 0
    for item in tapped:
        recording.at(frame=shown, time=float(item.time))
        source = _entity(item.source or "camera")
        recording.frame(f"{source}/frame", item.frame)
        if item.labels is not None:
            recording.labels(f"{source}/labels", np.asarray(item.labels).reshape(item.frame.shape[:2]))
        if item.confidence is not None:
            confidence = np.asarray(item.confidence).reshape(item.frame.shape[:2])
            recording.grey(f"{source}/confidence", confidence)
            recording.number(f"{source}/mean confidence", float(confidence.mean()) / 255)
        edges = getattr(item, "edges", None)
        if edges is not None:
            recording.grey(f"{source}/edges", np.asarray(edges).reshape(-1, *item.frame.shape[:2]).max(0))
        recording.number(f"{source}/version", float(item.version))
        shown += 1
        if most and shown >= most:
            break
    return shown


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.view",
        description="Show rounds of adaptation, or live frames with their answers, in Rerun.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_subparsers(dest="what", required=True, metavar="rounds|live")
    a = what.add_parser("rounds", help="finished rounds of a work folder")
    a.add_argument("workdir", type=Path, metavar="WORKDIR", help="--workdir of adapt.run")
    b = what.add_parser("live", help="frames of the live service")
    b.add_argument("--server", required=True, metavar="HOST:PORT")
    b.add_argument("--model", required=True)
    b.add_argument("--pack", type=Path, metavar="DIR", help="names and colours of the classes")
    b.add_argument("--source", default="", metavar="NAME", help="frames of this camera alone")
    b.add_argument("--max-fps", type=float, default=5.0, metavar="F", help="sampling rate of the tap (5)")
    b.add_argument("--frames", type=int, default=0, metavar="N", help="end after N frames (0: at SIGINT)")
    for command in (a, b):
        command.add_argument("--save", type=Path, metavar="FILE", help="write a recording, open no viewer")
    return p


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.view")


def _command(argv: list[str] | None) -> int:
    arguments = parser().parse_args(argv)
    began = time.monotonic()
    save: Path | None = arguments.save
    half = None if save is None else save.with_name(f".{save.name}.{os.getpid()}.tmp")
    count, stopped = 0, False
    try:
        if save is not None and not save.parent.is_dir():
            raise ViewError(f"{save.parent} is no folder: make it, or give another --save")
        recording = Recording(arguments.what, half)
        try:
            if arguments.what == "rounds":
                count = rounds(arguments.workdir, recording)
            else:
                count = _live(arguments, recording)
        except KeyboardInterrupt:  # the way to end a live view: what was seen is kept
            stopped = True
        finally:
            recording.close()
        if half is not None and save is not None:
            os.replace(half, save)
    except (ViewError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"adapt.view: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        if half is not None:
            half.unlink(missing_ok=True)
    if stopped:
        return 0
    where = f" in {arguments.save}" if arguments.save else ""
    kind = "rounds" if arguments.what == "rounds" else "frames"
    print(f"{count} {kind}{where}, {time.monotonic() - began:.1f} s")
    return 0


def _live(arguments: argparse.Namespace, recording: Recording) -> int:
    import grpc

    from runtime.client import Client, Rejected

    if arguments.pack:
        from networks.pack import PackError, load_pack

        try:
            spec = load_pack(arguments.pack).spec
        except PackError as error:
            raise ViewError(str(error)) from error
        recording.classes("/", list(spec.classes), [list(c) for c in spec.colours])
    with Client(arguments.server) as client:
        try:
            client.wait_ready(10)
            stream = client.frames(arguments.model, max_fps=arguments.max_fps, source=arguments.source)
            return live(stream, recording, arguments.frames)
        except (Rejected, grpc.RpcError, grpc.FutureTimeoutError) as error:
            words = getattr(error, "reason", "") or str(error) or "no answer in 10 s"
            raise ViewError(f"server {arguments.server}: {words}: is runtime.serve up?") from error


if __name__ == "__main__":
    sys.exit(main())
