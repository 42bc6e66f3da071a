"""Every speed and accuracy figure of docs/edges.md: matching, a whole evaluation, alignment, real time.

    python -m bench.edges [--data DIR] [--quick] [--images N]

A human table, then one JSON object as the last line of stdout.  Figures against published solvers need the
data beside the project (ROADWORTHY_DATA or --data) and are left out, with the reason, where it is absent.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from adapt.evaluate import edges
from adapt.evaluate.counting import count_raw
from adapt.evaluate.edges import levels_of, match
from adapt.evaluate.edges_main import evaluate
from adapt.labels import assignment
from adapt.labels.edges import category_edges, seg2edge
from adapt.labels.seal import Gate, align_details, tangents
from adapt.labels.thinning import thin
from bench import machine
from common.progress import ProgressBars


def seconds(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median (wall, processor) seconds of one call; the first call (compilation, caches) is not counted.

    On a machine that others use, the processor time of these single-threaded calls is what an idle one's
    clock would show, and the wall time is not.
    """
    work()
    times = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    wall, used = np.median(np.array(times), 0)
    return float(wall), float(used)


# ------------------------------------------------------------------------------------------------ scenes
def street(seed: int, size: tuple[int, int], present: int = 9, classes: int = 19) -> NDArray[np.uint8]:
    """A class map of smooth regions: ``present`` of the classes appear, as in a Cityscapes frame."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(classes)[:present]
    coarse = np.stack(
        [gaussian_filter(rng.normal(size=(size[0] // 4, size[1] // 4)), rng.uniform(4, 14)) for _ in chosen]
    )
    coarse /= coarse.std((1, 2), keepdims=True)
    label = chosen[coarse.argmax(0)].astype(np.uint8)
    return np.repeat(np.repeat(label, 4, 0), 4, 1)[: size[0], : size[1]]


def soft(edge: NDArray[np.bool_], seed: int) -> NDArray[np.uint8]:
    """What a trained network answers for an edge: a ridge a pixel off with a skirt, false alarms, zero
    elsewhere.
    """
    rng = np.random.default_rng(seed)
    ridge = gaussian_filter(np.roll(edge, (1, -1), (0, 1)).astype(np.float32), 1.2)
    strength = 0.35 + 0.6 * rng.random((edge.shape[0] // 16 + 1, edge.shape[1] // 16 + 1)).astype(np.float32)
    ridge *= np.kron(strength, np.ones((16, 16), np.float32))[: edge.shape[0], : edge.shape[1]]
    blobs = gaussian_filter((rng.random(edge.shape) > 0.9995).astype(np.float32), 2.0)
    return np.clip(255 * (1.3 * ridge + 4 * blobs), 0, 255).astype(np.uint8)


class Streets:
    """A Cityscapes-like set made on the fly: 512x1024 (its half resolution), 19 classes."""

    classes = tuple(f"class{k}" for k in range(19))
    protocol = edges.PROTOCOLS["cityscapes"]

    def __init__(self, images: int) -> None:
        self.names = [str(i) for i in range(images)]
        self.labels = [street(i, (512, 1024)) for i in range(images)]
        self.maps = [
            [soft(m, 100 * i + k) for k, m in enumerate(category_edges(label, 19))]
            for i, label in enumerate(self.labels)
        ]

    def truth(self, i: int, mode: str) -> NDArray[np.bool_]:
        return category_edges(self.labels[i], 19, 1 if mode == "thin" else 2)

    def read(self, name: str, size: tuple[int, int]) -> Sequence[NDArray[Any]]:
        return self.maps[int(name)]


def crop472() -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
    """(annotation, ridges, truth): a blob with 5-px-wide edges, annotated by a coarse polygon of itself."""
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:472, :472]
    angle, distance = np.arctan2(yy - 236, xx - 236), np.hypot(yy - 236, xx - 236)

    def radius(a: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(124 + 9 * np.sin(3 * a) + 6 * np.sin(7 * a + 1) + 3 * np.sin(13 * a))

    inside = distance < radius(angle)
    corners = np.linspace(-np.pi, np.pi, 31)
    polygon = distance < np.interp(angle, corners, radius(corners) + rng.normal(0, 2.0, 31))
    truth, annotation = seg2edge(inside), seg2edge(polygon)
    ridge = gaussian_filter(
        (inside ^ np.roll(inside, 1, 0) | inside ^ np.roll(inside, 1, 1)).astype(float), 1.2
    )
    return annotation, np.clip(0.97 * ridge / ridge.max() + 0.005, 0, 0.975), truth


# ----------------------------------------------------------------------------------------------- figures
def matching(data: Path | None, quick: bool) -> list[dict[str, Any]]:
    pair = None
    if data and (data / "bsds500_subset" / "edges").is_dir():
        from adapt.evaluate.edge_sets import open_truth

        masks = open_truth(f"bsds:{data}/bsds500_subset:test_1000").truth(0, "thin")
        pair = (masks[0], masks[1], "two annotators of a BSDS500 image")
    if pair is None:
        label = street(3, (321, 481), 6)
        edge = thin(seg2edge(label, 1))
        pair = (np.roll(edge, 1, 1), edge, "synthetic: no BSDS images at hand")
    prediction, truth, what = pair
    t = seconds(lambda: match(prediction, truth, 0.0075), 20)
    thick = seg2edge(street(3, (321, 481), 6))
    t_thin = seconds(lambda: thin(thick), 20)
    rows = [
        {
            "figure": "thin match, one 321x481 pair, .0075",
            "value": round(1e3 * t[0], 2),
            "cpu": round(1e3 * t[1], 2),
            "unit": "ms",
            "target": 10,
            "note": f"{what}, {prediction.sum()} x {truth.sum()} px",
        },
        {
            "figure": "thinning of a 321x481 edge map, radius 2",
            "value": round(1e3 * t_thin[0], 2),
            "cpu": round(1e3 * t_thin[1], 2),
            "unit": "ms",
        },
    ]
    edge = seg2edge(street(5, (642, 962), 9))
    level = levels_of(soft(edge, 5))
    t = seconds(lambda: count_raw(level, edge, 0.0035), 3 if quick else 7)
    rows.append(
        {
            "figure": "raw, all 99 thresholds, one 642x962 map, .0035",
            "value": round(t[0], 3),
            "cpu": round(t[1], 3),
            "unit": "s",
            "target": 0.5,
            "note": f"{int((level > 0).sum())} predicted px, {int(edge.sum())} truth px",
        }
    )
    t = seconds(lambda: count_raw(level[:375, :500], edge[:375, :500], 0.02), 3)
    rows.append(
        {
            "figure": "raw, all 99 thresholds, one 375x500 map, .02",
            "value": round(t[0], 3),
            "cpu": round(t[1], 3),
            "unit": "s",
        }
    )
    return rows


def evaluation(images: int) -> list[dict[str, Any]]:
    streets = Streets(images)
    evaluate(Streets(1), streets.read, modes=("thin", "raw"))  # compiled before the clock starts
    start, cpu = time.perf_counter(), time.process_time()
    with ProgressBars() as bars:
        tables = evaluate(streets, streets.read, progress=lambda done, total: bars("evaluation", done, total))
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    cores = len(os.sched_getaffinity(0))
    present = np.mean([[m.any() for m in category_edges(label, 19)] for label in streets.labels])
    return [
        {
            "figure": f"Cityscapes-val-sized evaluation, thin + raw, {cores} cores",
            "value": round(wall / images * 500 / 60, 1),
            "unit": "min",
            "target": 30,
            "note": f"extrapolated from {images} images x 19 classes at 512x1024, "
            f"{100 * present:.0f} % present; "
            f"{used / wall:.2f} cores busy",
        },
        {
            "figure": "the same, processor time",
            "value": None,
            "cpu": round(used / images * 500 / 60, 1),
            "unit": "core-min",
            "note": f"MF thin {100 * tables['thin'].ods():.1f}, raw {100 * tables['raw'].ods():.1f}",
        },
    ]


def alignment() -> list[dict[str, Any]]:
    annotation, ridge, truth = crop472()
    angle = tangents(annotation)
    rows: list[dict[str, Any]] = []
    for name, kind in (
        ("Cityscapes", {"sigma_x": 1.0, "sigma_y": 3.0, "max_cost": 2.0, "smoothness": 0.02}),
        ("SBD", {"sigma_x": 1.0, "sigma_y": 4.0, "max_cost": 4.5, "smoothness": 0.02}),
    ):
        costs = {}
        for solver in ("exact", "auction"):

            def run(solver: str = solver, kind: dict[str, float] = kind, **more: Any) -> Any:
                return align_details(annotation, ridge, tangents=angle, solver=solver, **{**kind, **more})

            t = seconds(run, 5)
            costs[solver] = run(smoothness=0.0).cost_after
            better = [
                (a & truth).sum() / (a | truth).sum()
                for a in (annotation, run().aligned, run(gate=Gate()).aligned)
            ]
            rows.append(
                {
                    "figure": f"align 472x472, {int(annotation.sum())} px, three solves, {solver}, {name}",
                    "value": round(t[0], 3),
                    "cpu": round(t[1], 3),
                    "unit": "s",
                    "target": 1.0 if solver == "exact" else None,
                    "note": "IoU with the truth {:.3f} before, {:.3f} after, {:.3f} gated".format(*better),
                }
            )
        captured: list[Any] = []
        original = assignment.auction

        def capture(*problem: Any, captured: list[Any] = captured, original: Any = original) -> Any:
            captured.append(problem)
            return original(*problem)

        from adapt.labels import seal

        seal._SOLVERS["captured"] = capture
        try:
            align_details(annotation, ridge, tangents=angle, solver="captured", **kind)
        finally:
            del seal._SOLVERS["captured"]
        each = [seconds(lambda p=p: assignment.auction(*p), 5) for p in captured]  # type: ignore[misc]
        gaps = []
        for columns, cost, counts in captured:
            taken = np.arange(len(counts))
            best = cost[taken, assignment.exact(columns, cost, counts)].sum()
            gaps.append(cost[taken, assignment.auction(columns, cost, counts)].sum() / best - 1)
        rows.append(
            {
                "figure": f"one auction solve, {name} (slowest of three)",
                "value": round(1e3 * max(w for w, _ in each), 1),
                "cpu": round(1e3 * max(c for _, c in each), 1),
                "unit": "ms",
                "target": 50,
                "note": f"cost above the exact one: {max(gaps):.1e} (limit 1e-4; exact rounds to hundredths)",
            }
        )
    return rows


def published(data: Path | None) -> list[dict[str, Any]]:
    """Counts and alignments against the published solvers' answers."""
    folder = data / "edge_fixtures" if data else None
    if folder is None or not (folder / "match.npz").is_file():
        return [
            {
                "figure": "published solvers' answers",
                "value": None,
                "unit": "",
                "note": "no edge_fixtures at hand",
            }
        ]
    given = np.load(folder / "match.npz")
    over = []
    for i in range(12):
        ours = match(given[f"prediction{i}"], given[f"truth{i}"], float(given[f"max_distance{i}"]))
        over.append(ours / given[f"counts{i}"].max() - 1)
    rows: list[dict[str, Any]] = [
        {
            "figure": "matched counts above the published solver's best of five, 12 pairs",
            "value": f"{100 * min(over):.2f} to {100 * max(over):.2f}",
            "unit": "%",
            "target": "0 to 0.5",
        }
    ]
    for name, kind in (
        ("seal_cityscapes", {"sigma_x": 1, "sigma_y": 3, "max_cost": 2, "smoothness": 0.02}),
        ("seal_sbd_no_smoothness", {"sigma_x": 1, "sigma_y": 4, "max_cost": 4.5, "smoothness": 0}),
    ):
        z = np.load(folder / f"{name}.npz")
        ours = align_details(z["gt"], z["prob"], tangents=z["tan"], solver="exact", **kind).aligned
        rows.append(
            {
                "figure": f"aligned pixels the same as the published solver's, {name}",
                "value": round(100 * (ours & z["aligned"]).sum() / z["aligned"].sum(), 2),
                "unit": "%",
                "target": 99.5,
            }
        )
    return rows


def gate_on_a_bad_detector(data: Path | None) -> list[dict[str, Any]]:
    """Labels that are right, and labels 2 px off, aligned to plain image gradients: with and without the
    gate."""
    if data is None or not (data / "camvid" / "day_val.txt").is_file():
        return [{"figure": "gate on a bad detector", "value": None, "unit": "", "note": "no CamVid at hand"}]
    from scipy.ndimage import gaussian_gradient_magnitude

    from adapt.data.open import open_dataset

    dataset = open_dataset(f"camvid:{data}/camvid:day_val")
    matched = np.zeros(
        (2, 3, 3), np.int64
    )  # [right, shifted] x [before, no gate, gate] x (hit, labelled, truth)
    for i in range(0, len(dataset), 20):
        frame, label = dataset[i]
        assert label is not None
        gradient = gaussian_gradient_magnitude(frame.mean(2), 1.0)
        ridge = np.clip(gradient / np.quantile(gradient, 0.99), 0.005, 0.995)
        truth = category_edges(label, 11)
        shifted = category_edges(np.roll(label, (2, 2), (0, 1)), 11)
        for row, given in enumerate((truth, shifted)):
            for k in np.flatnonzero(truth.sum((1, 2)) > 50):
                after = [
                    given[k],
                    align_details(given[k], ridge, solver="auction").aligned,
                    align_details(given[k], ridge, solver="auction", gate=Gate()).aligned,
                ]
                for column, mask in enumerate(after):
                    matched[row, column] += (match(mask, truth[k], 0.0016), mask.sum(), truth[k].sum())
    f = 2 * matched[..., 0] / (matched[..., 1] + matched[..., 2])
    return [
        {
            "figure": f"F at .0016 of CamVid labels aligned to image gradients, {what}",
            "value": f"{f[row, 1]:.3f} / {f[row, 2]:.3f}",
            "unit": "no gate / gate",
            "note": f"{f[row, 0]:.3f} before; {len(range(0, len(dataset), 20))} frames, 11 classes",
        }
        for row, what in enumerate(("labels right", "labels 2 px down and right"))
    ]


def real_time(size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """CASENet-R101 beside the light network, ONNX Runtime engine beside engine, one thread."""
    import onnxruntime
    import torch

    import networks
    from export.graph.writer import write
    from networks.pack import PackSpec

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    frame = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    rows: list[dict[str, Any]] = []
    for name, arguments in (("casenet_light", {"scale": 1.0}), ("casenet", {"depth": 101})):
        torch.manual_seed(0)
        network = networks.create(name, classes=19, **arguments).eval()
        spec = PackSpec(
            name=name,
            version="1.0.0",
            network=name,
            arguments=arguments,
            classes=Streets.classes,
            colours=((0, 0, 0),) * 19,
            size=size,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            task="edges",
        )
        model = write(network, spec, size=size)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        t = seconds(lambda s=session: s.run(None, {"frame": frame}), repeats)  # type: ignore[misc]
        rows.append(
            {
                "figure": f"{name} engine, {size[0]}x{size[1]}, 19 classes, one thread",
                "value": round(1e3 * t[0], 1),
                "cpu": round(1e3 * t[1], 1),
                "unit": "ms",
                "note": f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M "
                "parameters, random weights",
            }
        )
    rows.append(
        {
            "figure": "light over CASENet-R101",
            "value": round(rows[1]["value"] / rows[0]["value"], 1),
            "cpu": round(rows[1]["cpu"] / rows[0]["cpu"], 1),
            "unit": "x",
        }
    )
    return rows


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.edges", description=__doc__.split("\n\n")[0])
    here = Path(__file__).resolve().parent.parent
    p.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("ROADWORTHY_DATA", here.parent / "shared" / "data")),
        metavar="DIR",
        help="real data beside the project",
    )
    p.add_argument("--images", type=int, default=8, metavar="N", help="images of the evaluation figure (8)")
    p.add_argument("--quick", action="store_true", help="fewer repeats, two images, no CASENet-R101")
    a = p.parse_args(argv)
    about = machine.describe()
    data = a.data if a.data.is_dir() else None
    rows = matching(data, a.quick)
    rows += evaluation(2 if a.quick else a.images)
    rows += alignment()
    rows += published(data)
    rows += gate_on_a_bad_detector(data)
    if not a.quick:
        rows += real_time((256, 512), 3)
    about["load_after"] = round(os.getloadavg()[0], 2)
    print(machine.line(about))
    print()
    print(
        machine.table(
            rows,
            (
                ("figure", "figure"),
                ("value", "wall"),
                ("cpu", "processor"),
                ("unit", "unit"),
                ("target", "target"),
                ("note", "note"),
            ),
        )
    )
    print(json.dumps({"bench": "edges", "machine": about, "figures": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
