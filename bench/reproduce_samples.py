"""The table's own command on the few real frames that are at hand: every row of `adapt.reproduce`.

The sample frames are laid out as their authors publish the sets (GTA5's layout for the rendered ones,
Cityscapes' for the others), a small source pack is trained on the rendered ones, and each row is run by
``python -m adapt.reproduce gta5-cityscapes`` with nothing changed but sizes.  Fourteen source frames and six
scored ones prove that the path runs on real files; they say nothing about the algorithm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.real import RealError, command, data_folder

ROWS = ("source", "st", "cbst", "cbst-sp", "cbst-sp-mst")
# Cityscapes' trainIds -> labelIds, which is what its archives hold; 0 is "unlabelled".
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# CamVid's 11 classes -> labelIds, for the rendered frames: sky building pole road sidewalk tree sign fence …
RENDERED_IDS = (23, 11, 17, 7, 8, 21, 20, 13, 26, 24, 33)

EPILOG = """\
examples:
  python -m bench.reproduce_samples --out out/samples
  python -m bench.reproduce_samples --out out/samples --steps 5 --epochs 2 --row source --row cbst

exit codes: 0 every row was measured, 1 data missing or a row failed, 2 wrong usage
"""


def lay_out(data: Path, root: Path) -> None:
    """gta5/ and cityscapes/ under `root`, from the samples; a folder that is there is left as it is."""
    samples, rendered = data / "cityscapes_samples", data / "synthetic_samples"
    if not rendered.is_dir() or not samples.is_dir():
        raise RealError(f"{data} lacks cityscapes_samples or synthetic_samples")
    if not (root / "gta5").is_dir():
        part = root / "gta5.part"
        shutil.rmtree(part, ignore_errors=True)
        for file in sorted((rendered / "labels_camvid11").glob("*.png")):
            frame = next((rendered / "images").glob(f"{file.stem}.*"))
            _put(Image.open(frame).convert("RGB"), part / "images" / file.name)
            _put(_ids(file, RENDERED_IDS), part / "labels" / file.name)
        part.rename(root / "gta5")
    if not (root / "cityscapes").is_dir():
        part = root / "cityscapes.part"
        shutil.rmtree(part, ignore_errors=True)
        labelled = sorted((samples / "labels_trainid").glob("*.png"))
        scored = {file.stem: file for file in labelled[::2] + labelled[-1:]}
        for frame in sorted((samples / "images").iterdir()):
            city, split = frame.stem.partition("_")[0], "val" if frame.stem in scored else "train"
            _put(
                Image.open(frame).convert("RGB"),
                part / "leftImg8bit" / split / city / f"{frame.stem}_leftImg8bit.png",
            )
            if frame.stem in scored:  # the frames adapted on have no label here, as on a vehicle
                _put(
                    _ids(scored[frame.stem], LABEL_IDS),
                    part / "gtFine" / split / city / f"{frame.stem}_gtFine_labelIds.png",
                )
        part.rename(root / "cityscapes")


def _ids(file: Path, table: tuple[int, ...]) -> Image.Image:
    look = np.zeros(256, np.uint8)
    look[: len(table)] = table
    with Image.open(file) as image:
        return Image.fromarray(look[np.asarray(image)])


def _put(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Lay out, train, run the rows; {"miou": {row: 0..1}, "frames": …}."""
    out: Path = arguments.out.resolve()
    root, pack, log = out / "data", out / "source", out / "log.txt"
    root.mkdir(parents=True, exist_ok=True)
    lay_out(data_folder(), root)
    if not pack.is_dir():
        command(
            [
                "adapt.train",
                "--network",
                "roadnet",
                "--classes",
                "cityscapes19",
                "--data",
                f"gta5:{root / 'gta5'}",
                "--size",
                arguments.size,
                "--epochs",
                str(arguments.epochs),
                "--batch",
                "4",
                "--rate",
                "2e-3",
                "--replay",
                "14",
                "--name",
                "rendered-samples",
                "--licence",
                "research only",
                "--threads",
                "1",
                "--out",
                str(pack),
                "--quiet",
                "--json",
            ],
            log,
        )
    scores = {}
    for row in arguments.row or ROWS:
        told = json.loads(
            command(
                [
                    "adapt.reproduce",
                    "gta5-cityscapes",
                    "--row",
                    row,
                    "--pack",
                    str(pack),
                    "--root",
                    str(root),
                    "--out",
                    str(out / row),
                    "--set",
                    f"steps={arguments.steps}",
                    "--threads",
                    "1",
                    "--quiet",
                    "--json",
                ],
                log,
            )
        )
        scores[row] = told["miou"]
        frames = told["frames"]
        print(f"{row}: {100 * told['miou']:.1f}", file=sys.stderr, flush=True)
    return {"miou": scores, "scored_frames": frames, "steps": arguments.steps}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.reproduce_samples",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, default=Path("out/samples"), metavar="DIR", help="data, pack, rows")
    p.add_argument("--size", default="256x512", metavar="HxW", help="frame size (256x512)")
    p.add_argument("--epochs", type=int, default=40, metavar="N", help="of the source pack (40)")
    p.add_argument("--steps", type=int, default=30, metavar="N", help="of each of three trainings (30)")
    p.add_argument("--row", action="append", choices=ROWS, help="this row (again for more; all)")
    arguments = p.parse_args(argv)
    try:
        found = measure(arguments)
    except (RealError, OSError, ValueError) as error:
        print(f"bench.reproduce_samples: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print("| row | mIoU, % |\n|---|---:|")
    for row, value in found["miou"].items():
        print(f"| {row} | {100 * value:.1f} |")
    print(json.dumps(found | {"load": os.getloadavg()[0]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
