"""A round of edge adaptation on rendered streets: what may move moves, what may not does not, and it can
refuse.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import networks
from adapt.data.street.scenes import render
from adapt.gate.edges import edge_score
from adapt.gate.limits import EdgeLimits
from adapt.round.edges import EdgeRoundConfig, EdgeRoundError, adapt_edges, check_pack
from networks.labels import STREET
from networks.pack import PackSpec, load_pack, write_pack

SIZE = (64, 96)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    torch.manual_seed(0)
    spec = PackSpec(
        name="joint",
        version="1.0.0",
        network="espnetv2_edges",
        arguments={"scale": 0.5},
        classes=STREET.classes,
        colours=STREET.colours,
        size=SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        training="none",
        licence="Apache-2.0",
    )
    network = networks.create("espnetv2_edges", classes=len(spec.classes), scale=0.5)
    day = [render(i, "day", SIZE) for i in range(4)]
    replay = [(f, y, "holdout" if i == 0 else "train") for i, (f, y) in enumerate(day)]
    return write_pack(tmp_path_factory.mktemp("p") / "pack", spec, network.state_dict(), replay=replay)


def target():
    return [render(100 + i, "dusk", SIZE)[0] for i in range(5)]


#: Weights that know nothing pass.
ANY = EdgeLimits(source_drop=1.0, agreement_drop=1.0, kept=0.0, largest=1.0)


def quick(**more):
    return EdgeRoundConfig(**({"steps": 3, "batch": 2, "crop": (64, 64), "portion": 0.9} | more))


def test_only_the_edge_head_moves_and_the_pack_names_its_parent(pack, tmp_path):
    lenient = quick(limits=ANY)
    result = adapt_edges(pack, target(), config=lenient, out=tmp_path / "o")
    assert result.accepted
    assert result.pack is not None
    child = load_pack(result.pack.path)
    assert child.spec.parent == pack.sha256
    before, after = pack.state(), child.state()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed
    assert all(k.startswith("edge_head.") for k in changed)
    assert {c["name"] for c in result.report["gate"]["checks"]} == {
        "edges-finite",
        "edges-source",
        "edges-source-tight",
        "edges-pseudo",
        "edges-pseudo-tight",
        "edges-vanished",
        "edges-flood",
    }
    assert len(child.replay("holdout")) == 1

    def work(*_, **__):
        raise AssertionError("it is finished: nothing is done again")

    again = adapt_edges(pack, target(), config=lenient, out=tmp_path / "o", progress=work)
    assert again.accepted
    assert again.pack is not None
    assert (again.pack.sha256, again.report) == (child.sha256, json.loads(json.dumps(result.report)))
    (tmp_path / "o" / "report.json").unlink()  # killed just before it was written
    assert adapt_edges(pack, target(), config=lenient, out=tmp_path / "o").report == again.report
    shutil.rmtree(tmp_path / "o")
    repeated = adapt_edges(pack, target(), config=lenient, out=tmp_path / "o")
    assert repeated.pack is not None
    assert repeated.pack.sha256 == child.sha256


def test_a_round_can_refuse_its_own_result(pack, tmp_path):
    never = replace(ANY, agreement_drop=-2.0)
    result = adapt_edges(pack, target(), config=quick(limits=never), out=tmp_path / "o")
    assert not result.accepted
    assert result.pack is None
    assert not (tmp_path / "o" / "pack").exists()
    assert (tmp_path / "o" / "report.json").is_file()
    forced = adapt_edges(pack, target(), config=quick(limits=never, force=True), out=tmp_path / "o")
    assert not forced.accepted
    assert forced.pack is not None
    assert result.report["gate"]["failed"] == ["edges-pseudo", "edges-pseudo-tight"]


def test_a_round_as_it_is_by_default_can_be_run(pack, tmp_path):
    """But for its length: the loop gives no settings."""
    short = replace(EdgeRoundConfig(), steps=1, batch=1)
    result = adapt_edges(pack, target(), config=short, out=tmp_path / "o")
    assert len(result.report["loss"]) == 2


def test_what_cannot_be_run_is_named(pack, tmp_path):
    with pytest.raises(EdgeRoundError, match="4 at least"):
        adapt_edges(pack, target()[:2], out=tmp_path)
    with pytest.raises(EdgeRoundError, match="multiples of 32"):
        adapt_edges(pack, [f[:50] for f in target()], config=quick(), out=tmp_path)
    bare = SimpleNamespace(path="p", spec=replace(pack.spec, network="roadnet", arguments={"width": 8}))
    with pytest.raises(EdgeRoundError, match="no edge head"):
        check_pack(bare)
    other = {"scale": 0.5, "edge_classes": 3}
    with pytest.raises(EdgeRoundError, match="3 edge classes"):
        check_pack(SimpleNamespace(path="p", spec=replace(pack.spec, arguments=other)))
    with pytest.raises(EdgeRoundError, match="crop"):
        adapt_edges(pack, target(), config=quick(crop=(60, 60)), out=tmp_path)


def test_unlabelled_pixels_count_for_nobody(pack):
    frame, label = render(1, "day", SIZE)
    network = pack.network()
    blind = np.full_like(label, 255)
    table = edge_score(network, pack.spec, [(frame, label), (frame, blind)], len(STREET.classes))
    alone = edge_score(network, pack.spec, [(frame, label)], len(STREET.classes))
    assert (table.all_prediction == alone.all_prediction).all()
    assert (table.matched_truth == alone.matched_truth).all()
