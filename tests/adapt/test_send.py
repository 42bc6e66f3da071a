"""Sending a folder's frames to a live server, as the README shows it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from adapt.send import main
from export.build import Options, build
from runtime.client import Client
from runtime.config import EngineConfig, ServerConfig
from runtime.server import Server
from tests.adapt.conftest import toy_scene


@pytest.fixture(scope="module")
def server(toy_pack, tmp_path_factory):
    repository = tmp_path_factory.mktemp("repo")
    build(toy_pack, repository, model="toy", options=Options(threads=1))
    config = ServerConfig(repository=str(repository), port=0, metrics_port=-1, engine=EngineConfig(threads=1))
    with Server(config) as running:
        yield running


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "drive").mkdir()
    for i in range(3):
        frame = np.kron(toy_scene(i)[0], np.ones((2, 2, 1), np.uint8))  # twice the model's size
        Image.fromarray(frame).save(tmp_path / "drive" / f"{i}.png")
    return tmp_path / "drive"


def told(server, pictures, *more: str) -> list[str]:
    return [str(pictures), "--server", server.target, "--model", "toy", "--rate", "0", "--json", *more]


def test_every_frame_of_a_folder_is_answered_and_seen_by_the_tap(server, pictures, capsys):
    with Client(server.target) as client:
        stream = client.frames("toy", source="front")
        tapped = iter(stream)
        assert main([f"front={pictures}", *told(server, pictures, "--loop", "--frames", "7")[1:]]) == 0
        frame = next(tapped)
        stream.close()
    assert frame.source == "front"
    assert frame.frame.shape == (32, 64, 3)
    assert json.loads(capsys.readouterr().out) == {"sent": 7, "answered": 7, "refused": 0}


def test_refusals_are_counted_and_failures_are_one_line(server, pictures, capsys):
    for arguments, words in (
        (["--model", "none"], "none"),
        (["--server", "127.0.0.1:1"], "start runtime.serve"),
        (["--token-file", str(pictures / "no")], "cannot be used"),
    ):
        assert main(told(server, pictures, *arguments)) == 1
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert main(told(server, pictures / "none")) == 1
    assert "is not there" in capsys.readouterr().err
    for file in pictures.iterdir():
        file.write_bytes(b"")
    assert main(told(server, pictures, "--loop")) == 1
    assert "gave no frame" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(told(server, pictures, "--rate", "-1"))
    assert end.value.code == 2
