"""The benches of edges: damage, the verdict on the order, a killed bench that goes on, the gate, the peer."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest

from adapt.data.street import scenes
from adapt.evaluate.edges import EdgeCounts
from adapt.labels.edges import category_edges
from bench import edges_gate, edges_order
from bench.edges_damage import damaged, outline, pushed, simplified, simplified_line, widened
from bench.peers import edges as peer


def regions(seed=0, size=(96, 128)):
    return scenes.render(seed, "day", size)[1]


# ------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("most", [2.0, 8.0])
def test_a_push_takes_each_pixel_from_at_most_so_far_away(most):
    rows, columns = np.mgrid[:60, :80]
    for index in (rows, columns):
        moved = pushed(index.astype(np.uint8), np.random.default_rng(3), most).astype(int)
        assert np.abs(moved - index).max() <= most + 1
    away = np.hypot(
        *(
            pushed(i.astype(np.uint8), np.random.default_rng(3), most).astype(float) - i
            for i in (rows, columns)
        )
    )
    assert away.max() > most / 2
    label = regions()
    assert (pushed(label, np.random.default_rng(0), 0) == label).all()


def test_an_outline_goes_once_round_its_region():
    mask = np.zeros((20, 30), bool)
    mask[4:14, 5:25] = True
    line = outline(mask)
    border = {(y, x) for y, x in np.argwhere(mask) if y in (4, 13) or x in (5, 24)}
    assert len(line) == len(set(line)) == len(border)
    assert set(line) == border
    steps = np.abs(np.diff(np.array([*line, line[0]]), axis=0)).max(1)
    assert (steps == 1).all()
    thin = np.zeros((5, 12), bool)
    thin[2, 1:11] = True
    assert set(outline(thin)) == {(2, x) for x in range(1, 11)}  # there and back
    thin[:] = False
    assert outline(thin) == []
    thin[3, 3] = True
    assert outline(thin) == [(3, 3)]


def test_a_simplified_line_stays_within_its_tolerance():
    t = np.linspace(0, 6, 200)
    line = np.stack([20 * np.sin(t), 15 * t], 1)
    for tolerance in (0.5, 2.0):
        corners = simplified_line(line, tolerance)
        assert 2 < len(corners) < 60
        worst = 0.0
        for a, b in itertools.pairwise(corners):
            first, last = (int(np.flatnonzero((line == c).all(1))[0]) for c in (a, b))
            way, between = b - a, line[first : last + 1] - a
            area = np.abs(way[0] * between[:, 1] - way[1] * between[:, 0])
            worst = max(worst, float((area / np.hypot(*way)).max()))
        assert worst <= tolerance
    assert len(simplified_line(line, 0.5)) > len(simplified_line(line, 2.0))


def test_polygons_cut_corners_but_keep_regions():
    label = regions(2)
    near, coarse = simplified(label, 0.5), simplified(label, 3.0)
    assert (near != label).mean() < (coarse != label).mean() < 0.1
    assert (near != label).mean() < 0.02
    assert (simplified(label, 0) == label).all()
    square = np.zeros((40, 40), np.uint8)
    square[10:30, 10:30] = 3
    assert (simplified(square, 1.0) == square).all()


def test_objects_grow_over_what_is_beside_them():
    label = np.zeros((20, 20), np.uint8)
    label[8:12, 8:12], label[8:12, 13:15] = 1, 2
    wide = widened(label, (1, 2), 1)
    assert (wide[7:13, 7:12] == 1).all()
    assert (wide[7:13, 12:16] == 2).all()
    assert (widened(label, (1, 2), 0) == label).all()


def test_more_push_is_more_damage_and_a_seed_repeats_it():
    label = regions(1)
    f = []
    for most in (2, 4, 8):
        given = damaged(label, np.random.default_rng(5), most, (8, 9, 10, 11))
        assert (given == damaged(label, np.random.default_rng(5), most, (8, 9, 10, 11))).all()
        table = EdgeCounts(0.0075, thin=False, classes=12)
        table.add_classes(category_edges(given, 12), category_edges(label, 12))
        f.append(table.ods())
    assert 1 > f[0] > f[1] > f[2]


# -------------------------------------------------------------------------------------------------- order
def results(values):
    """values: {method: [raw of each seed]} at push 4, .0075; thin is raw less 10."""
    return [
        {"method": m, "push": 4.0, "seed": s, "mf": {"raw 0.0075": v / 100, "thin 0.0075": (v - 10) / 100}}
        for m, seeds in values.items()
        for s, v in enumerate(seeds)
    ]


def judged(values):
    import unittest.mock

    with unittest.mock.patch.object(edges_order, "TOLERANCES", (0.0075,)):
        return {k: v["holds"] for k, v in edges_order.verdicts(results(values))["4"]["0.0075"].items()}


def test_the_order_holds_if_differences_are_a_point_and_over_twice_their_spread():
    values = {"casenet": [50, 51, 52], "casenet-s": [52, 53.1, 54.0], "seal": [54, 55, 56.1]}
    assert judged(values) == {
        "raw S over CASENet": True,
        "raw SEAL over S": True,
        "thin SEAL at least S - .3": True,
    }
    noisy = values | {"casenet-s": [50, 57, 54]}
    assert judged(noisy)["raw S over CASENet"] is False
    small = values | {"seal": [52.5, 53.6, 54.5]}
    assert judged(small)["raw SEAL over S"] is False
    assert judged(small)["thin SEAL at least S - .3"] is True
    worse = values | {"seal": [51, 52, 53]}
    assert judged(worse)["thin SEAL at least S - .3"] is False
    assert judged({m: v[:1] for m, v in values.items()})["raw SEAL over S"] is None


def test_the_summary_is_mean_and_spread_over_seeds():
    cell = edges_order.summary(results({"seal": [50, 52, 54]}))["4"]["raw 0.0075"]["seal"]
    assert cell == {"mean": 52.0, "spread": 2.0, "seeds": 3}
    assert edges_order.summary(results({"seal": [50]}))["4"]["raw 0.0075"]["seal"]["spread"] is None
    row = edges_order.rows_of(edges_order.summary(results({"seal": [50, 52]})), ("seal", "casenet"))[0]
    assert row["casenet"] is None
    assert row["seal"] == "51.0 ± 1.4"


def test_methods_differ_in_loss_and_alignment_alone():
    settings = edges_order.Settings()
    recipes = {m: edges_order.recipe_of(m, settings) for m in (*edges_order.METHODS, "seal-gated")}
    assert recipes["casenet-s"] == recipes["casenet-c"]
    assert recipes["casenet"].reweighted
    assert not any(recipes[m].reweighted for m in recipes if m != "casenet")
    assert [m for m, r in recipes.items() if r.aligned] == ["seal", "seal-gated"]
    assert recipes["seal"].gate is None
    assert recipes["seal-gated"].gate is not None


def test_a_perfect_detector_scores_one_and_void_is_not_counted():
    label = regions()
    exact = category_edges(label, 12).astype(np.float32)
    found = edges_order.scores(lambda frame: exact, [(np.zeros((96, 128, 3), np.uint8), label)], 12)
    assert all(found[f"raw {t}"] == 1 for t in edges_order.TOLERANCES)
    void = label.copy()
    void[30:60, 40:90] = 255
    marks = category_edges(void, 12, ignore=()).astype(np.float32)
    found = edges_order.scores(lambda frame: marks, [(np.zeros((96, 128, 3), np.uint8), void)], 12)
    assert all(found[f"raw {t}"] == 1 for t in edges_order.TOLERANCES)


def test_the_bench_goes_on_with_the_files_of_one_that_was_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edges_order, "TOLERANCES", (0.0075,))

    class Small(edges_order.Settings):
        def __init__(self, **k):
            super().__init__(**{"batch": 2, "round": 4, **k, "size": (64, 96), "crop": (32, 48)})

    monkeypatch.setattr(edges_order, "Settings", Small)
    arguments = [
        *("--out", str(tmp_path), "--frames", "2", "--test", "1", "--warm", "2", "--steps", "3"),
        *("--width", "8", "--methods", "casenet", "casenet-s", "seal"),
    ]
    assert edges_order.main(arguments) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(first["mf"]["4"]["raw 0.0075"]) == {"casenet", "casenet-s", "seal"}
    files = {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    lost = next(tmp_path.glob("*-seal.json"))
    lost.unlink()
    assert edges_order.main(arguments) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["mf"] == first["mf"]  # from the same warm-up, on the same crops
    changed = [f.name for f in tmp_path.iterdir() if f.stat().st_mtime_ns != files[f.name]]
    assert changed == [lost.name]
    with pytest.raises(SystemExit):
        edges_order.main(["--out", str(tmp_path), "--methods", "nope"])


def test_without_the_crf_s_library_its_column_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    monkeypatch.setattr(edges_order.Trial, "warm", lambda self: (self._network().state_dict(), 0.0))
    arguments = ["--out", str(tmp_path), "--frames", "1", "--test", "1", "--width", "8"]
    arguments += ["--methods", "casenet-c"]
    assert edges_order.main(arguments) == 0
    captured = capsys.readouterr()
    assert "not installed" in json.loads(captured.out.splitlines()[-1])["left_out"]["casenet-c"]
    assert "casenet-c is left out" in captured.err


# --------------------------------------------------------------------------------------------- gate, peer
def test_auc_counts_pairs_and_ties_by_half():
    rng = np.random.default_rng(0)
    score, good = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.4
    a, b = score[good][:, None], score[~good][None]
    assert edges_gate.auc(score, good) == pytest.approx(((a > b) + 0.5 * (a == b)).mean())
    assert np.isnan(edges_gate.auc(score, np.ones(60, bool)))


def test_the_peer_s_absence_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ROADWORTHY_PEERS", str(tmp_path))
    assert peer.main(["--size", "32x48"]) == 1
    error = capsys.readouterr().err
    assert "--install edges" in error
    assert error.count("\n") == 1


def test_counts_of_maps_are_those_of_the_library():
    pairs = peer.maps(1, (48, 64), 1)
    assert len(pairs) > 3
    counts, seconds = peer.ours(pairs, 0.0075, True)
    assert counts.shape == (len(pairs), 4, 99)
    assert len(seconds) == len(pairs)
    table = EdgeCounts(0.0075)
    for p, truth in pairs:
        table.add(p, truth)
    assert (counts[:, 2].sum(0) == table.matched_prediction[0]).all()
    assert peer._ods(counts) == table.ods()
