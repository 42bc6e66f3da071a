"""``python -m adapt.mark``: serve the page on which a person corrects what a network thinks of frames."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import DataError
from adapt.mark.frames import ORDERS, Frames, order
from common.cli import run_command

EPILOG = """\
examples:
  python -m adapt.mark adapt-road/frames --pack packs/city          # a frame store
  python -m adapt.mark pictures/ --pack packs/city --out weak.json --source human:ab

The page is served on 127.0.0.1 alone; open the address that is printed. Every mark is saved at once.

exit codes: 0 ended (Ctrl-C), 1 refused (one line on stderr says why), 2 wrong usage
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.mark",
        description="Mark frames in the browser: the frames of which the network is least sure come first, "
        "its answer is shown, and a person corrects it with clicks, boxes and lines.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("frames", metavar="STORE|FOLDER", help="a frame store or a folder of pictures")
    p.add_argument("--pack", required=True, metavar="DIR", help="model pack whose answer is corrected")
    p.add_argument(
        "--out", metavar="FILE", help="marks file (weak.json beside the frames); goes on if it is there"
    )
    p.add_argument(
        "--minutes", type=float, default=10, metavar="N", help="time planned, for the page's clock (10)"
    )
    p.add_argument("--order", choices=ORDERS, default="unsure", help="which frame comes first (unsure)")
    p.add_argument("--source", default="human", metavar="NAME", help="who marks: human or human:NAME (human)")
    p.add_argument("--port", type=int, default=0, metavar="N", help="port on the loopback (0 = a free one)")
    p.add_argument("--key", metavar="FILE", help="key of a sealed frame store")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="torch threads (as they are)")
    return p


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.mark")


def _command(argv: list[str] | None) -> int:
    command = parser()
    arguments = command.parse_args(argv)
    if not (0 <= arguments.port <= 65535 and 0 < arguments.minutes <= 1440 and arguments.threads >= 0):
        command.error("--port is 0 to 65535, --minutes more than 0 and at most 1440, --threads from 0 on")
    if arguments.source != "human" and not arguments.source.startswith("human:"):
        command.error(f"--source {arguments.source}: a person marks here, write human or human:NAME")
    from adapt.frames.encryption import SealError
    from adapt.frames.store import StoreError
    from adapt.weak.marks import WeakError
    from networks.pack import PackError

    try:
        return _serve(arguments)
    except (DataError, StoreError, SealError, WeakError, PackError, OSError) as error:
        print(f"adapt.mark: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _serve(arguments: argparse.Namespace) -> int:
    import torch

    from adapt import inference
    from adapt.frames.selection import confidence_summary
    from adapt.mark.server import PageServer
    from adapt.mark.session import Session
    from networks.pack import load_pack

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = Path(arguments.frames)
    pack = load_pack(arguments.pack)
    if pack.spec.task != "segmentation":
        raise DataError(f"pack {arguments.pack} has task {pack.spec.task!r}: give a segmentation pack")
    frames = Frames.of(where, arguments.key)
    out = Path(arguments.out) if arguments.out else where / "weak.json"
    session = Session(out, tuple(pack.spec.classes), arguments.source)
    try:
        network = pack.network().eval()

        def answer(i: int) -> tuple[np.ndarray, np.ndarray]:
            tensor = inference.as_tensor([frames.read(i)])
            labels, confidence = inference.labels_and_confidence(network, pack.spec, tensor)
            return labels[0], confidence[0]

        summaries: list[dict[str, Any]] = [{}] * len(frames.keys)
        if arguments.order == "unsure":
            count = len(frames.keys)
            print(f"adapt.mark: looking at {count} frames", file=sys.stderr, flush=True)
            summaries = [confidence_summary(*answer(i), len(pack.spec.classes)) for i in range(count)]
        way = order(arguments.order, summaries)
        with PageServer(
            session,
            [frames.keys[i] for i in way],
            lambda i: frames.read(way[i]),
            lambda i: answer(way[i])[0],
            pack.spec.colours,
            minutes=arguments.minutes,
            port=arguments.port,
        ) as server:
            print(server.url, flush=True)
            print(f"adapt.mark: marks go to {out}; Ctrl-C ends", file=sys.stderr, flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:  # how a person ends it, after every mark is saved
                counts = session.labels.counts()
                print(f"adapt.mark: {counts['frames']} frames with marks in {out}", file=sys.stderr)
        return 0
    finally:
        session.close()


if __name__ == "__main__":
    sys.exit(main())
