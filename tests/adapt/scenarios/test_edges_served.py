"""Edges end to end: a round on the edge head, both heads built, and submitted together to a live server."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import networks
from adapt.data.street.scenes import render
from adapt.gate.limits import EdgeLimits, Limits
from adapt.labels.edge_probability import edge_probability
from adapt.loop import EdgeMember, Loop, LoopConfig
from adapt.round import RoundConfig
from adapt.round.edges import EdgeRoundConfig, adapt_edges
from export.build import Options, build
from networks.labels import STREET
from networks.pack import PackSpec, load_pack, write_pack
from runtime.client import Client
from runtime.config import EngineConfig, GuardConfig, ServerConfig, ShadowConfig, WatchConfig
from runtime.repository.repository import Repository
from runtime.server import Server

SIZE = (64, 96)
FRAMES = [render(100 + i, "dusk", SIZE)[0] for i in range(5)]
NO_LATENCY = GuardConfig(latency_slack_ms=1e9)  # what a run costs on this machine decides nothing


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A joint pack of seeded weights, whose segmentation shows several classes."""
    torch.manual_seed(0)
    spec = PackSpec(
        name="joint",
        version="1.0.0",
        network="espnetv2_edges",
        arguments={"scale": 0.5},
        task="joint",
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
    path = tmp_path_factory.mktemp("p") / "pack"
    golden = np.stack([frame for frame, _ in day[:2]])
    return write_pack(path, spec, network.state_dict(), golden=golden, replay=replay)


def limits(pack):
    """Thresholds that a tenth of the pixels passes: the weights have learnt nothing, all is near 0.5."""
    network = pack.network()
    seen = np.stack([edge_probability(network, pack.spec, frame) for frame in FRAMES[:2]])
    return tuple(float(np.quantile(seen[:, k], 0.9)) for k in range(seen.shape[1]))


def build_both(pack, repository, thresholds, **how):
    """{model: version} of the two heads of one pack."""
    options = {
        "seg": Options(threads=1, task="segmentation"),
        "edges": Options(threads=1, task="edges", edge_thresholds=thresholds),
    }
    return {m: build(pack, repository, model=m, options=o, **how).version for m, o in options.items()}


def blind(pack, folder):
    """The pack with an edge head that sees nothing any more."""
    state = pack.state()
    for name in [k for k in state if k.startswith("edge_head.")]:
        state[name] = torch.full_like(state[name], -5.0 if name.endswith("bias") else 0.0)
    spec = dataclasses.replace(pack.spec, parent=pack.sha256)
    return write_pack(folder, spec, state, golden=pack.golden())


@pytest.mark.slow
def test_the_loop_takes_both_heads_of_one_pack_live_as_they_are_served(pack, tmp_path):
    """Built with the tasks and thresholds of what is live: the pack's own task is "joint"."""
    repository = Repository(tmp_path / "engines")
    thresholds = limits(pack)
    build_both(pack, repository, thresholds)
    config = ServerConfig(
        repository=str(repository.path),
        port=0,
        metrics_port=-1,
        groups={"scene": ["seg", "edges"]},
        engine=EngineConfig(threads=1),
        guard=NO_LATENCY,
        shadow=ShadowConfig(idle_timeout=0.05),
        watch=WatchConfig(seconds=0.0),
    )
    anything = Limits(
        source_drop=1.0,
        kept=0.0,
        variety=0.0,
        flip_drop=1.0,
        parent_flip_drop=1.0,
        teacher=0.0,
        agreement=0.0,
        translated_drop=1.0,
        calibration_rise=1.0,
        confidence_jump=1.0,
        foreign=1.0,
        largest=1.0,
        temporal_drop=1.0,
        shares_rise=99.0,
    )
    frames = [render(200 + i, "dusk", SIZE)[0] for i in range(8)]
    captured = [
        SimpleNamespace(
            frame=frame,
            time=time.time(),
            source="front",
            model="seg",
            version=1,
            labels=None,
            confidence=None,
            place=None,
            collect=None,
            dropped=0,
        )
        for frame in frames
    ]
    source = SimpleNamespace(
        finished=False, get=lambda timeout: captured.pop(0) if captured else None, close=lambda: None
    )
    edges = EdgeRoundConfig(
        steps=2,
        batch=2,
        crop=(64, 64),
        portion=0.9,
        rate=1e-6,
        limits=EdgeLimits(source_drop=1.0, agreement_drop=1.0, kept=0.0, largest=1.0),
    )
    with Server(config) as server, Client(server.target) as client:
        loop = Loop(
            client,
            pack,
            repository.path,
            tmp_path / "work",
            LoopConfig(
                model="seg",
                frames=8,
                near=0,
                round=RoundConfig(
                    portions=(0.9,),
                    steps=1,
                    rate=1e-6,
                    adabn=False,
                    bn="frozen",
                    source=1,
                    target=1,
                    limits=anything,
                ),
            ),
            progress=lambda *a, **k: None,
            source=source,
            edges=EdgeMember(pack, "edges", "scene", edges),
            once=True,
        )
        report = loop.once()
        loop.close()
        assert (report["state"], report.get("edges")) == ("LIVE", "accepted"), report["reason"]
        assert report["members"] == {"seg": 2, "edges": 2}
        answer = client.infer("scene", FRAMES[0], outputs=("labels", "edge_bits"))
        assert answer.version == 2
        for model, task in (("seg", "segmentation"), ("edges", "edges")):
            assert repository.manifest(model, 2)["task"] == task
        assert repository.manifest("edges", 2)["edge_thresholds"] == pytest.approx(list(thresholds))
        loaded = load_pack(tmp_path / "work" / "round-0001" / "edges" / "pack")
        assert answer.parameters["edges.pack"] == loaded.sha256


@pytest.mark.slow
def test_a_round_of_edges_goes_live_with_its_segmentation_or_not_at_all(pack, tmp_path):
    repository = Repository(tmp_path / "engines")
    thresholds = limits(pack)
    first = build_both(pack, repository, thresholds)
    config = ServerConfig(
        repository=str(repository.path),
        port=0,
        metrics_port=-1,
        groups={"scene": ["seg", "edges"]},
        engine=EngineConfig(threads=1),
        guard=NO_LATENCY,
        shadow=ShadowConfig(idle_timeout=0.05),
        watch=WatchConfig(seconds=0.0),
    )
    lenient = EdgeRoundConfig(
        steps=2,
        batch=2,
        crop=(64, 64),
        portion=0.9,
        rate=1e-6,
        limits=EdgeLimits(source_drop=1.0, agreement_drop=1.0, kept=0.0, largest=1.0),
    )
    with Server(config) as server, Client(server.target) as client:
        assert client.infer("scene", FRAMES[0], outputs=("labels", "edge_bits")).version == 1
        result = adapt_edges(pack, FRAMES, config=lenient, out=tmp_path / "round")
        assert result.pack is not None
        child = load_pack(result.pack.path)
        report = {"kind": "edges", "round": 1}
        members = build_both(child, repository, thresholds, adaptation=report, gate={"passed": True})
        *_, last = client.submit_group("scene", members)
        assert (last.state, last.version) == ("LIVE", 2), last
        answer = client.infer("scene", FRAMES[0], outputs=("labels", "confidence", "edge_bits", "edges"))
        assert answer.version == 2
        for model in ("seg", "edges"):
            assert answer.parameters[f"{model}.pack"] == child.sha256
            assert answer.parameters[f"{model}.round"] == "1"
        assert answer.outputs["edges"].shape == (len(STREET.classes), *SIZE)

        options = Options(threads=1, task="edges", edge_thresholds=thresholds)
        bad = build(blind(child, tmp_path / "blind"), repository, model="edges", options=options).version
        *_, last = client.submit_group("scene", {"seg": first["seg"], "edges": bad})
        assert (last.state, last.check) == ("REJECTED", "collapse"), last
        assert "member 'edges'" in last.reason
        assert client.infer("scene", FRAMES[0], outputs=("labels", "edge_bits")).version == 2
        live = {name: status["live"] for name, status in client.status()["models"].items()}
        assert live == members != first
