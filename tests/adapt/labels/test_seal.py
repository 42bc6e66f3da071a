"""Alignment against dense assignment and its own formulas; the auction's promise; the gate."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

from adapt.evaluate.edges import match
from adapt.labels import assignment
from adapt.labels.edges import seg2edge
from adapt.labels.errors import EdgeError
from adapt.labels.seal import Gate, align, align_details, tangents


def sparse_case(rng, n, m, width):
    """A feasible padded problem: row i always has column i."""
    counts = rng.integers(1, width + 1, n)
    columns = np.zeros((n, width), np.int32)
    for i in range(n):
        others = rng.permutation(np.setdiff1d(np.arange(m), [i]))[: counts[i] - 1]
        columns[i, : counts[i]] = rng.permutation(np.append(others, i))
    return columns, np.round(rng.random((n, width)) * 20, 2), counts.astype(np.int64)


def cost_of(choice, costs):
    return costs[np.arange(len(choice)), choice].sum()


def best_cost(columns, costs, counts):
    dense = np.full((len(counts), int(columns.max()) + 1), 1e6)
    for i, count in enumerate(counts):
        dense[i, columns[i, :count]] = costs[i, :count]
    rows, picked = linear_sum_assignment(dense)
    return dense[rows, picked].sum()


@given(st.integers(0, 10_000), st.integers(1, 25), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_solvers_reach_the_optimum_of_dense_assignment(seed, n, width):
    rng = np.random.default_rng(seed)
    m = n + int(rng.integers(0, 10)) + width
    columns, costs, counts = sparse_case(rng, n, m, width)
    best = best_cost(columns, costs, counts)
    tensors = (torch.from_numpy(columns).long(), torch.from_numpy(costs), torch.from_numpy(counts))
    answers = {
        "exact": assignment.exact(columns, costs, counts),
        "auction": assignment.auction(columns, costs, counts, 1e-4),
        "torch": assignment.auction_torch(*tensors, 1e-4).numpy(),
    }
    for name, choice in answers.items():
        assert (choice < counts).all()
        taken = columns[np.arange(n), choice]
        assert len(set(taken.tolist())) == n
        slack = 1e-6 if name == "exact" else n * 1e-4 + 1e-6
        assert best - 1e-6 <= cost_of(choice, costs) <= best + slack


def test_left_alone_both_auctions_end_within_a_ten_thousandth_of_the_optimum():
    rng = np.random.default_rng(7)
    columns, costs, counts = sparse_case(rng, 60, 64, 6)
    costs = costs / 100 + 0.01  # an ε of .01 is coarse here
    best = best_cost(columns, costs, counts)
    tensors = (torch.from_numpy(columns).long(), torch.from_numpy(costs), torch.from_numpy(counts))
    for choice in (assignment.auction(columns, costs, counts), assignment.auction_torch(*tensors).numpy()):
        assert best - 1e-6 <= cost_of(choice, costs) <= best * (1 + 1e-4)


def test_an_impossible_assignment_is_named():
    columns, costs, counts = np.zeros((2, 1), np.int32), np.ones((2, 1)), np.ones(2, np.int64)
    with pytest.raises(EdgeError, match="more candidates"):
        assignment.exact(columns, costs, counts)


def scene(seed=0, size=(96, 112), shift=3):
    """A blob, its noisy annotation (shifted and simplified) and a ridge map on the true contour."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[: size[0], : size[1]]
    angle = np.arctan2(yy - size[0] / 2, xx - size[1] / 2)
    radius = 26 + 4 * np.sin(3 * angle) + 3 * np.sin(5 * angle + 1)
    inside = np.hypot(yy - size[0] / 2, xx - size[1] / 2) < radius
    truth = seg2edge(inside)
    annotation = seg2edge(np.roll(inside, (shift, -shift), (0, 1)))
    contour = gaussian_filter(
        (inside ^ np.roll(inside, 1, 0) | inside ^ np.roll(inside, 1, 1)).astype(float), 1
    )
    ridge = np.clip(contour / contour.max() * 0.95 + 0.02 * rng.random(size), 0.001, 0.999)
    return truth, annotation, ridge.astype(np.float32)


def written_out(label, p, sigma_x, sigma_y, max_cost, smoothness, iterations):
    """SEAL's energy and ICM in plain loops, solved by dense assignment."""
    pixels = np.argwhere(label)
    angle = tangents(label)
    cost = np.clip(np.log((1 - p.astype(float)) / p), -64, 64) + 64
    reach = math.ceil(max(sigma_x, sigma_y) * math.sqrt(2 * max_cost))
    height, width = label.shape
    candidates = []
    for y, x in pixels:
        t = angle[y, x]
        along, across = np.array([math.cos(t), math.sin(t)]), np.array([-math.sin(t), math.cos(t)])
        mine = {}
        for v, u in itertools.product(range(-reach, reach + 1), repeat=2):
            if 0 <= y - v < height and 0 <= x + u < width:
                move = np.array([u, v])
                s = (move @ along) ** 2 / (2 * sigma_x**2) + (move @ across) ** 2 / (2 * sigma_y**2)
                if s <= max_cost + 1e-12:
                    mine[(y - v) * width + x + u] = (cost[y - v, x + u] + s, u, v)
        candidates.append(mine)

    def solve(extra):
        dense = np.full((len(pixels), label.size), 1e9)
        for q, mine in enumerate(candidates):
            for column, (c, u, v) in mine.items():
                dense[q, column] = np.rint(100 * (c + extra(q, u, v)))
        return linear_sum_assignment(dense)[1], dense

    picked, dense = solve(lambda q, u, v: 0.0)
    where = {tuple(p): i for i, p in enumerate(pixels)}
    for _ in range(iterations if smoothness else 0):
        moved = [candidates[q][c][1:] for q, c in enumerate(picked)]
        around = []
        for q, start in enumerate(pixels):
            reached, ring = {q}, [tuple(start)]
            for _ in range(16):
                ring = [
                    (y + j, x + i)
                    for y, x in ring
                    for j in (-1, 0, 1)
                    for i in (-1, 0, 1)
                    if (y + j, x + i) in where and where[y + j, x + i] not in reached
                ]
                ring = list(dict.fromkeys(ring))
                reached.update(where[r] for r in ring)
            around.append([moved[w] for w in reached if w != q])
        picked, dense = solve(
            lambda q, u, v, around=around: smoothness * sum((a - u) ** 2 + (b - v) ** 2 for a, b in around[q])
        )
    return picked, dense


@pytest.mark.parametrize("smoothness", [0.0, 0.02])
def test_exact_alignment_has_the_optimal_cost_of_the_energy_written_out(smoothness):
    _, annotation, ridge = scene(1)
    label, p = annotation[:34, 36:76], ridge[:34, 36:76]
    assert 60 < label.sum() < 260
    arguments = {"sigma_x": 1.0, "sigma_y": 3.0, "max_cost": 2.0}
    iterations = 0 if smoothness == 0 else 1
    picked, dense = written_out(label, p, *arguments.values(), smoothness, iterations)
    ours = align_details(label, p, smoothness=smoothness, iterations=iterations, **arguments)
    target = ours.target[:, 0] * label.shape[1] + ours.target[:, 1]
    rows = np.arange(len(target))
    assert (ours.source == np.argwhere(label)).all()
    # Ties of the first solve may steer the second elsewhere, a few hundredths of a unit in all.
    best = dense[rows, picked].sum()
    assert dense[rows, target].sum() == pytest.approx(best, rel=0 if smoothness == 0 else 2e-5)


@pytest.mark.parametrize("solver", ["exact", "auction"])
def test_a_good_ridge_pulls_a_shifted_label_onto_the_truth(solver):
    truth, annotation, ridge = scene()
    aligned = align(annotation, ridge, sigma_y=4, max_cost=4.5, smoothness=0.02, solver=solver)
    assert aligned.sum() == annotation.sum()
    hits = [
        match(label, truth, 1.5 / np.hypot(*truth.shape)) / truth.sum() for label in (annotation, aligned)
    ]
    assert hits[1] > hits[0] + 0.2
    assert hits[1] > 0.9


def test_the_auction_keeps_its_promise_on_the_whole_problem():
    _, annotation, ridge = scene(2)
    exact, quick = (align_details(annotation, ridge, smoothness=0, solver=s) for s in ("exact", "auction"))
    assert quick.cost_after <= exact.cost_after * (1 + 1e-4) + 0.01


def test_alignment_is_deterministic():
    _, annotation, ridge = scene(3)
    assert (align(annotation, ridge) == align(annotation, ridge)).all()


def pieces_by_detector():
    """(mean move, spread, benefit in pixels, stopped) of every piece of five scenes, by detector.

    Detectors: the true contour as a ridge, and noise.  Benefit: how much nearer a piece came to the truth.
    Noise is met with a tenth of SEAL's smoothness, because at SEAL's own it hardly moves a label at all.
    """
    from scipy.ndimage import distance_transform_edt

    out = {"ridge": [], "noise": []}
    for seed in range(5):
        truth, annotation, ridge = scene(seed)
        noise = np.random.default_rng(seed).uniform(0.001, 0.999, truth.shape)
        away = distance_transform_edt(~truth)
        for name, p, smoothness in (("ridge", ridge, 0.02), ("noise", noise, 0.002)):
            free = align_details(annotation, p, smoothness=smoothness)
            gated = align_details(annotation, p, smoothness=smoothness, gate=Gate())
            nearer = away[tuple(free.source.T)] - away[tuple(free.target.T)]
            benefit = np.bincount(free.piece, nearer) / free.pieces.size
            assert gated.aligned.sum() == annotation.sum()
            assert not gated.shift[~gated.moved].any()
            out[name].append((free.pieces.move, free.pieces.spread, benefit, gated.pieces.stopped))
    return {name: [np.concatenate(c) for c in zip(*rows, strict=True)] for name, rows in out.items()}


def test_the_spread_of_moves_tells_help_from_harm_and_the_gate_acts_on_it():
    found = pieces_by_detector()
    _, _, benefit, stopped = found["ridge"]
    assert benefit.mean() > 0.3
    assert (benefit * ~stopped).sum() > 0.8 * benefit.sum()  # the good detector keeps its gain
    _, _, benefit, stopped = found["noise"]
    assert benefit.sum() < 0
    assert stopped.mean() > 0.8
    assert (benefit * ~stopped).sum() > 0.1 * benefit.sum()  # and nine tenths of the harm are stopped
    move, spread, benefit, _ = (np.concatenate(c) for c in zip(*found.values(), strict=True))
    score, helped = move / (spread + 0.3), benefit > 0.05
    chance = (score[helped][:, None] > score[~helped][None]).mean()
    assert chance > 0.85


def test_pieces_are_what_their_moves_say():
    _, annotation, ridge = scene(2)
    free = align_details(annotation, ridge)
    moves = (free.target - free.source).astype(float)
    for i in range(len(free.pieces.size)):
        own = moves[free.piece == i]
        assert free.pieces.size[i] == len(own)
        assert free.pieces.move[i] == pytest.approx(np.hypot(*own.T).mean())
        assert free.pieces.spread[i] == pytest.approx(np.sqrt(((own - own.mean(0)) ** 2).sum(1).mean()))
        ys, xs = free.source[free.piece == i].T
        assert len(set(ys // 32)) == len(set(xs // 32)) == 1
    assert not free.pieces.stopped.any()


def test_a_gate_nothing_passes_returns_the_label_and_an_open_one_changes_nothing():
    _, annotation, ridge = scene()
    shut = align_details(annotation, ridge, gate=Gate(spread=0.0, base=0.0, slope=0.0))
    assert (shut.aligned == annotation).all()
    assert not shut.shift.any()
    assert shut.pieces.stopped.any()
    wide = Gate(spread=1e9, base=1e9)
    assert (align(annotation, ridge, gate=wide) == align(annotation, ridge)).all()
    with pytest.raises(EdgeError, match="limits"):
        Gate(spread=float("nan"))


def test_tangents_of_lines_are_their_directions_y_up():
    flat, upright, rising = np.zeros((3, 30, 30), bool)
    flat[15, 3:27] = True
    upright[3:27, 15] = True
    rising[np.arange(26, 3, -1), np.arange(3, 26)] = True
    assert np.allclose(tangents(flat)[flat], 0)
    assert np.allclose(np.abs(tangents(upright)[upright]), math.pi / 2)
    assert np.allclose(tangents(rising)[rising], math.pi / 4)
    point = np.zeros((5, 5), bool)
    point[2, 2] = True
    assert tangents(point)[2, 2] == math.pi / 2


def test_empty_labels_stay_empty_and_one_pixel_stays_one():
    p = np.full((12, 12), 0.5, np.float32)
    empty = np.zeros((12, 12), bool)
    assert not align(empty, p).any()
    assert align(np.ones((1, 1), bool), p[:1, :1]).all()
    certain = np.zeros((12, 12))
    certain[6, 6] = 1.0  # log 0 is clipped
    empty[5, 6] = True
    assert align(empty, certain).sum() == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"label": np.zeros((5, 5), np.uint8)}, "bool"),
        ({"probability": np.zeros((5, 6), np.float32)}, "one size"),
        ({"probability": np.zeros((5, 5), np.uint8)}, "divide bytes"),
        ({"probability": np.full((5, 5), np.nan)}, "NaN"),
        ({"probability": np.full((5, 5), 3.0)}, "logits"),
        ({"tangents": np.zeros((4, 5))}, "tangents"),
        ({"sigma_x": 0.0}, "sigma_x"),
        ({"max_cost": float("inf")}, "max_cost"),
        ({"smoothness": -1.0}, "smoothness"),
        ({"solver": "greedy"}, "exact or auction"),
        ({"sigma_y": 1e6}, "64 at most"),
        ({"gate": "strict"}, "give a Gate"),
    ],
)
def test_bad_input_is_named_in_one_line(change, word):
    arguments = {"label": np.eye(5, dtype=bool), "probability": np.full((5, 5), 0.5)} | change
    label, probability = arguments.pop("label"), arguments.pop("probability")
    with pytest.raises(EdgeError, match=word) as caught:
        align(label, probability, **arguments)
    assert "\n" not in str(caught.value)
