"""`constrain` bit for bit against a plain restatement, and the anchored loss against its definition."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.labels.cbst import pseudo_labels
from adapt.labels.weak import allowed_of, anchor_pixels, constrain
from adapt.train.losses import anchored_cross_entropy
from adapt.weak import Box, Marks, Point, Polygon, Scribble, WeakError

CLASSES = ("sky", "road", "car", "pole")
WIDTH, HEIGHT = 13, 9


# ------------------------------------------------------------------------------- the plain restatement
def winding(x: float, y: float, corners: list[tuple[float, float]]) -> int:
    turns = 0
    for k, (ax, ay) in enumerate(corners):
        bx, by = corners[(k + 1) % len(corners)]
        up = 1
        if ay > by:
            ax, ay, bx, by, up = bx, by, ax, ay, -1
        if ay <= y < by and ax + (y - ay) * ((bx - ax) / (by - ay)) <= x:
            turns += up
    return turns


def near_line(x: int, y: int, line: tuple[tuple[int, int], ...], width: float) -> bool:
    limit = max(0.5, width / 2) ** 2
    ends = list(pairwise(line)) or [(line[0], line[0])]
    for (ax, ay), (bx, by) in ends:
        dx, dy = float(bx - ax), float(by - ay)
        length = dx * dx + dy * dy
        t = min(max(((x - ax) * dx + (y - ay) * dy) / length, 0.0), 1.0) if length else 0.0
        if (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2 <= limit:
            return True
    return False


def classes_of(label: str) -> tuple[str, list[int]]:
    if label == "?":
        return "without", list(range(len(CLASSES)))
    names = [CLASSES.index(n) for n in label.strip("!").split("|")]
    return ("without" if label[0] == "!" else "one of"), sorted(names)


def plainly(y, p, m, radius, share, few):  # type: ignore[no-untyped-def]
    out = [[int(v) for v in row] for row in y]
    anchored = [[False] * WIDTH for _ in range(HEIGHT)]
    held = [[False] * WIDTH for _ in range(HEIGHT)]
    fixed = [[False] * WIDTH for _ in range(HEIGHT)]
    pixels = [(x, y) for y in range(HEIGHT) for x in range(WIDTH)]
    may = [c for c, n in enumerate(CLASSES) if (n in m.present if m.complete else n not in m.absent)]

    def best(label, x, y):  # type: ignore[no-untyped-def]
        kind, which = classes_of(label)
        which = [c for c in which if c in may]
        return None if kind == "without" or not which else max(which, key=lambda c: (p[c, y, x], -c))

    def gone(label):  # type: ignore[no-untyped-def]
        kind, which = classes_of(label)
        return which if kind == "without" else []

    def holds(b, x, y):  # type: ignore[no-untyped-def]
        return b.x0 <= x + 0.5 < b.x1 and b.y0 <= y + 0.5 < b.y1

    for x, y in pixels:
        if out[y][x] not in may:
            out[y][x] = 255
        for name in m.all_boxes:
            if out[y][x] == CLASSES.index(name) and not any(
                holds(b, x, y) for b in m.boxes if b.label == name
            ):
                out[y][x] = 255
    inside = [[(x, y) for x, y in pixels if holds(b, x, y)] for b in m.boxes]
    for k in sorted(range(len(inside)), key=lambda k: -len(inside[k])):
        c = CLASSES.index(m.boxes[k].label)
        ranked = sorted(inside[k], key=lambda at: -p[c, at[1], at[0]])
        for x, y in ranked[: int(share * len(ranked))]:
            out[y][x], fixed[y][x] = c, True
    for mark in m.coarse:
        for x, y in pixels:
            if winding(x + 0.5, y + 0.5, list(mark.polygon)):
                c = best(mark.label, x, y)
                if c is not None:
                    out[y][x], held[y][x] = c, True
                elif out[y][x] in gone(mark.label):
                    out[y][x] = 255
                if mark.label == "?":
                    held[y][x] = True
    for x, y in pixels:
        for s in m.scribbles:
            if gone(s.label) and near_line(x, y, s.line, s.width):
                fixed[y][x] = True
                out[y][x] = 255 if out[y][x] in gone(s.label) else out[y][x]
        for q in m.points:
            if gone(q.label) and (q.x - x) ** 2 + (q.y - y) ** 2 <= radius * radius:
                fixed[y][x] = True
                out[y][x] = 255 if out[y][x] in gone(q.label) else out[y][x]
    for x, y in pixels:
        for s in m.scribbles:
            c = best(s.label, x, y)
            if c is not None and near_line(x, y, s.line, s.width) and (not held[y][x] or out[y][x] == c):
                out[y][x], anchored[y][x] = c, True
        least = math.inf
        for q in m.points:
            c, d = best(q.label, x, y), (q.x - x) ** 2 + (q.y - y) ** 2
            if c is not None and d <= radius * radius and d < least:
                least = d
                if not held[y][x] or out[y][x] == c:
                    out[y][x], anchored[y][x] = c, True
    missing = [CLASSES.index(n) for n in m.present if all(CLASSES.index(n) != v for r in out for v in r)]
    for c in missing if few else []:
        free = [
            (x, y)
            for x, y in pixels
            if max(range(len(CLASSES)), key=lambda k: (p[k, y, x], -k)) == c
            and not (fixed[y][x] or held[y][x] or anchored[y][x])
            and (
                CLASSES[c] not in m.all_boxes or any(holds(b, x, y) for b in m.boxes if b.label == CLASSES[c])
            )
        ]
        free.sort(key=lambda at: -p[c, at[1], at[0]])
        for x, y in free[: max(1, int(few * WIDTH * HEIGHT))]:
            out[y][x] = c
    return np.array(out, np.uint8), np.array(anchored)


xs, ys = st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1)
label = st.sampled_from([*CLASSES, "!car", "!sky|road", "road|car", "sky|pole", "?"])
points = st.lists(st.builds(Point, xs, ys, label), max_size=5)
lines = st.lists(
    st.builds(
        Scribble,
        label,
        st.lists(st.tuples(xs, ys), min_size=1, max_size=4).map(tuple),
        st.sampled_from([1, 2, 3, 4.5]),
    ),
    max_size=3,
)
corner = st.tuples(
    st.integers(0, 2 * WIDTH).map(lambda v: v / 2), st.integers(0, 2 * HEIGHT).map(lambda v: v / 2)
)
polygons = st.lists(
    st.builds(Polygon, label, st.lists(corner, min_size=3, max_size=6).map(tuple)), max_size=3
)
boxes = st.lists(
    st.builds(
        lambda x, y, w, h, c: Box(x, y, min(x + w, WIDTH), min(y + h, HEIGHT), c),
        xs,
        ys,
        st.integers(1, 8),
        st.integers(1, 8),
        st.sampled_from(CLASSES),
    ),
    max_size=4,
)


@given(
    st.integers(0, 2**32 - 1),
    points,
    lines,
    boxes,
    polygons,
    st.dictionaries(st.sampled_from(CLASSES), st.booleans(), max_size=3),
    st.booleans(),
    st.sets(st.sampled_from(CLASSES), max_size=2),
    st.sampled_from([0, 1, 1.5, 3]),
    st.sampled_from([0, 0.3, 0.5, 1]),
    st.sampled_from([0, 5e-4, 0.05]),
)
@settings(max_examples=300, deadline=None)
def test_equals_the_plain_restatement(seed, pts, scr, bxs, pol, tags, whole, every, radius, share, few):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    p = (rng.integers(1, 6, (4, HEIGHT, WIDTH)) / 16).astype(np.float32)  # ties abound
    y = rng.choice([0, 1, 2, 3, 255], (HEIGHT, WIDTH)).astype(np.uint8)
    present = tuple(c for c, yes in tags.items() if yes)
    marks = Marks(
        CLASSES,
        (WIDTH, HEIGHT),
        present,
        tuple(c for c, yes in tags.items() if not yes),
        tuple(pts),
        tuple(scr),
        tuple(bxs),
        tuple(pol),
        whole and bool(present),
        tuple(every),
        checked=False,
    )
    before = y.copy()
    got = constrain(y, p, marks, radius=radius, box_share=share, present_share=few)
    wanted = plainly(y, p, marks, radius, share, few)
    assert np.array_equal(got[0], wanted[0])
    assert np.array_equal(got[1], wanted[1])
    assert np.array_equal(y, before)
    of_torch = constrain(y, torch.from_numpy(p), marks, radius=radius, box_share=share, present_share=few)
    assert all(np.array_equal(a, b) for a, b in zip(got, of_torch, strict=True))
    assert np.array_equal(
        anchor_pixels(marks, y.shape, radius=radius) & ~got[1], np.zeros_like(got[1])
    ) or any("|" in m.label for m in marks.marks())


def test_absent_tags_are_what_allowed_does() -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(4), (HEIGHT, WIDTH)).transpose(2, 0, 1).astype(np.float32)
    lam = np.full(4, 0.3)
    marks = Marks(CLASSES, (WIDTH, HEIGHT), absent=("car",))
    assert allowed_of(marks, CLASSES) == [0, 1, 3]
    wanted = pseudo_labels(p, lam, allowed=[0, 1, 3])
    labels, anchored = constrain(wanted, p, marks)
    assert np.array_equal(labels, wanted)
    assert not anchored.any()
    assert allowed_of(None, CLASSES) is None
    assert allowed_of(Marks(CLASSES, (4, 4), present=("car",)), CLASSES) is None
    assert allowed_of(Marks(CLASSES, (4, 4), present=("car",), complete=True), CLASSES) == [2]
    with pytest.raises(ValueError, match="read them with these classes"):
        allowed_of(marks, CLASSES[::-1])


def test_refuses_another_size_and_other_classes() -> None:
    y, p = np.zeros((HEIGHT, WIDTH), np.uint8), np.zeros((4, HEIGHT, WIDTH), np.float32)
    with pytest.raises(ValueError, match="scale the marks"):
        constrain(y, p, Marks(CLASSES, (WIDTH + 1, HEIGHT)))
    with pytest.raises(ValueError, match="one per class"):
        constrain(y, p[:3], Marks(CLASSES, (WIDTH, HEIGHT)))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        constrain(y, p, Marks(CLASSES, (WIDTH, HEIGHT)), box_share=2)


def test_anchored_loss_is_the_weighted_mean_over_anchored_pixels() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 5, 6, generator=generator)
    labels = torch.randint(0, 4, (2, 5, 6), generator=generator)
    labels[0, 0] = 255
    anchored = torch.rand(2, 5, 6, generator=generator) < 0.4
    each = [
        -logits[n, :, y, x].log_softmax(0)[labels[n, y, x]]
        for n, y, x in anchored.nonzero().tolist()
        if labels[n, y, x] != 255
    ]
    wanted = 0.1 * torch.stack(each).mean()
    assert torch.allclose(anchored_cross_entropy(logits, labels, anchored, 0.1), wanted)
    none = torch.zeros_like(anchored)
    assert anchored_cross_entropy(logits, labels, none, 0.1).item() == 0


def test_scaled_marks_fit_the_other_frame() -> None:
    marks = Marks(
        CLASSES,
        (10, 10),
        points=(Point(0, 0, "sky"), Point(1, 0, "road"), Point(9, 9, "car")),
        boxes=(Box(2, 2, 5, 7, "car"),),
        coarse=(Polygon("pole", ((6, 0), (10, 0), (10, 5), (6, 5))),),
    )
    half = marks.scaled((5, 5))
    assert [(q.x, q.y) for q in half.points] == [(4, 4)]  # two facts on one pixel say nothing
    assert half.boxes[0] == Box(1, 1, 2.5, 3.5, "car")
    assert marks.scaled((10, 10)) is marks
    twice = marks.scaled((20, 20))
    assert [(q.x, q.y) for q in twice.points] == [(1, 1), (3, 1), (19, 19)]
    with pytest.raises(WeakError, match="no picture's"):
        replace(marks, size=(0, 3))
