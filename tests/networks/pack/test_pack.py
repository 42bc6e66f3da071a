"""The model pack: round trip, hash, and refusal of everything that is not a whole pack."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from networks.pack import PackError, PackSpec, load_pack, normalise, write_pack
from networks.pack import pack as pack_module
from networks.pack.checks import read_frame


@pytest.fixture
def replay():
    rng = np.random.default_rng(1)
    splits = ["train", "holdout", "train"]
    values = np.array([0, 3, 11, 255], np.uint8)
    return [(rng.integers(0, 256, (64, 96, 3), np.uint8), rng.choice(values, (64, 96)), s) for s in splits]


@pytest.fixture
def path(tmp_path, spec, state, frames, replay):
    reference = {"share": np.full(12, 1 / 12), "confidence": np.zeros((12, 256), np.int64)}
    prior = np.full((12, 4, 6), 1 / 12)
    write_pack(tmp_path / "p", spec, state, golden=frames, replay=replay, reference=reference, prior=prior)
    return tmp_path / "p"


def refuses(path, words):
    with pytest.raises(PackError, match=words) as caught:
        load_pack(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_written_is_what_is_read(path, spec, state, frames, replay):
    pack = load_pack(path)
    assert pack.spec == spec
    assert {k: v.tolist() for k, v in pack.state().items()} == {k: v.tolist() for k, v in state.items()}
    assert np.array_equal(pack.golden(), frames)
    assert [len(pack.replay(s)) for s in ("train", "holdout", None)] == [2, 1, 3]
    frame, label = pack.replay("holdout")[0]
    assert np.array_equal(read_frame(frame), replay[1][0])
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(label)), replay[1][1])
    assert pack.prior().dtype == np.float16
    assert pack.reference()["confidence"].dtype == np.int64


def test_the_network_holds_the_weights_and_is_in_evaluation_mode(path, state):
    network = load_pack(path).network()
    assert not network.training
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_a_pack_without_the_optional_parts(tmp_path, spec, state):
    pack = write_pack(tmp_path / "p", spec, state)
    assert pack.golden().shape == (0, 64, 96, 3)
    assert pack.replay() == []
    assert pack.prior() is None
    assert pack.reference() == {}


def test_the_hash_is_the_documented_one_and_covers_every_file(path):
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        total.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    before = load_pack(path).sha256
    assert before == total.hexdigest()
    label = path / "replay" / "labels" / "0001.png"
    label.write_bytes(label.read_bytes() + b"\0")
    assert load_pack(path).sha256 != before
    with pytest.raises(PackError, match="altered or is another pack"):
        load_pack(path, sha256=before)


def test_a_description_survives_toml(spec):
    facts = {"round": 2, "lambda": [0.5, 0.25], "none": None, "np": np.float64(1.5)}
    rich = dataclasses.replace(spec, parent="a" * 64, adaptation=facts)
    back = PackSpec.from_toml(rich.to_toml())
    assert back.adaptation == {"round": 2, "lambda": [0.5, 0.25], "np": 1.5}
    assert dataclasses.replace(back, adaptation={}) == dataclasses.replace(rich, adaptation={})


def test_normalise_is_the_textbook_formula_in_the_packs_channel_order(spec):
    frames = torch.tensor(np.random.default_rng(2).integers(0, 256, (2, 5, 7, 3), np.uint8))
    for order in ("rgb", "bgr"):
        s = dataclasses.replace(spec, channel_order=order, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
        x = frames.numpy().astype(np.float64)
        if order == "bgr":
            x = x[..., ::-1]
        wanted = ((x / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.125]).transpose(0, 3, 1, 2)
        result = normalise(frames, s)
        assert result.dtype == torch.float32
        assert np.allclose(result.numpy(), wanted, atol=1e-5)


class TestWeightsThatAreNotTheNetworks:
    def edit(self, path, change):
        weights = load_file(path / "weights.safetensors")
        change(weights)
        save_file(weights, path / "weights.safetensors")

    def test_missing(self, path):
        self.edit(path, lambda w: w.pop("stem.0.conv.weight"))
        refuses(path, "weights lack 'stem.0.conv.weight'")

    def test_extra(self, path):
        self.edit(path, lambda w: w.update(stray=torch.zeros(1)))
        refuses(path, "weights hold 'stray' that the network lacks")

    def test_misshapen(self, path):
        self.edit(path, lambda w: w.update({"classify.bias": torch.zeros(7)}))
        refuses(path, r"'classify.bias' has shape \[7\], the network wants \[12\]")

    def test_of_another_type(self, path):
        self.edit(path, lambda w: w.update({"classify.bias": torch.zeros(12, dtype=torch.float16)}))
        refuses(path, "'classify.bias' has type torch.float16")

    def test_not_finite(self, path):
        self.edit(path, lambda w: w.update({"classify.bias": torch.full((12,), torch.nan)}))
        refuses(path, "'classify.bias' holds NaN")

    def test_truncated(self, path):
        file = path / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        refuses(path, "weights.safetensors cannot be read")

    def test_absent(self, path):
        (path / "weights.safetensors").unlink()
        refuses(path, "has no weights.safetensors")


class TestADescriptionThatIsWrong:
    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("schema = 1", "schema = 9", "schema 9; this version reads schema 1"),
            ('network = "roadnet"', 'network = "nope"', "network 'nope' is unknown"),
            ("width = 8", "depth = 8", "refuses its arguments"),
            ("width = 8", "width = 16", "has shape"),
            ('"person",', "", "11 classes but 12 colours"),
            ('name = "tiny"\n', "", "model.toml lacks fields: name"),
            ('name = "tiny"', 'name = "../tiny"', "must be letters, digits"),
            ('name = "tiny"', "name = tiny", "is not TOML"),
            ('parent = ""', 'parent = "12"', "is not a SHA-256"),
            ('channel_order = "rgb"', 'channel_order = "rbg"', "must be 'rgb' or 'bgr'"),
            ('task = "segmentation"', 'task = "depth"', "task 'depth' is unknown"),
            ("schema = 1", "schema = 1\nfrobnicate = 2", "unknown fields: frobnicate"),
            ("    64,\n    96,", "    64,\n    100,", "size 64x100 must be a multiple of 32"),
            ("0.225", "0.0", "std must be positive"),
            pytest.param("0.225", "1" + "0" * 400, "std must be three finite numbers", id="no-float"),
            pytest.param("0.225", "1" + "0" * 5000, "is not TOML", id="endless"),
            ("colours = [", "colours = [\n [inf, 0, 0],", "malformed list"),
        ],
    )
    def test_is_refused_by_name(self, path, old, new, words):
        file = path / "model.toml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        refuses(path, words)

    def test_no_directory(self, tmp_path):
        refuses(tmp_path / "nowhere", "is not a directory")

    def test_no_description(self, tmp_path):
        refuses(tmp_path, "has no model.toml")


class TestTheOtherFiles:
    def test_a_golden_frame_that_is_no_image(self, path):
        (path / "golden" / "0001.png").write_bytes(b"nonsense")
        refuses(path, r"0001\.png' cannot be read as an image")

    def test_a_missing_replay_file(self, path):
        (path / "replay" / "labels" / "0002.png").unlink()
        refuses(path, r"replay file 'labels/0002\.png' is missing")

    def test_an_index_that_reaches_outside_the_pack(self, path):
        entries = [{"frame": "../../secret.png", "label": "labels/0000.png", "split": "train"}]
        (path / "replay" / "index.json").write_text(json.dumps(entries))
        refuses(path, "outside the pack")

    def test_statistics_of_another_class_count(self, path):
        np.savez(path / "reference.npz", share=np.zeros(5))
        refuses(path, r"'share' has shape \[5\], wanted 12 rows")

    def test_statistics_that_would_unpickle(self, path):
        np.savez(path / "reference.npz", share=np.array([{}], dtype=object))
        refuses(path, r"reference\.npz cannot be read")


class TestWriting:
    def test_never_overwrites(self, path, spec, state):
        before = load_pack(path).sha256
        with pytest.raises(PackError, match="exists already"):
            write_pack(path, spec, state)
        assert load_pack(path).sha256 == before

    def test_wrong_weights_leave_nothing_behind(self, tmp_path, spec, state):
        del state["classify.bias"]
        with pytest.raises(PackError, match="weights lack"):
            write_pack(tmp_path / "p", spec, state)
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_fills_in_mid_write_leaves_nothing_behind(self, tmp_path, spec, state, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pack_module, "sync_tree", full)
        with pytest.raises(PackError, match="cannot be written: No space left on device"):
            write_pack(tmp_path / "p", spec, state)
        assert list(tmp_path.iterdir()) == []

    def test_what_killed_writers_left_is_swept_when_it_is_old(self, tmp_path, spec, state):
        old, new = tmp_path / ".p.partial-1", tmp_path / ".p.partial-2"
        for folder in (old, new):
            folder.mkdir()
        os.utime(old, (0, 0))
        write_pack(tmp_path / "p", spec, state)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".p.partial-2", "p"]

    def test_a_replay_label_outside_the_classes_is_refused(self, tmp_path, spec, state):
        frame, label = np.zeros((64, 96, 3), np.uint8), np.full((64, 96), 12, np.uint8)
        with pytest.raises(PackError, match="label 0 holds class 12, the pack has 12 classes"):
            write_pack(tmp_path / "p", spec, state, replay=[(frame, label, "train")])
        assert list(tmp_path.iterdir()) == []

    def test_an_unknown_split_is_refused(self, tmp_path, spec, state):
        frame, label = np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8)
        with pytest.raises(PackError, match="split 'test' is unknown"):
            write_pack(tmp_path / "p", spec, state, replay=[(frame, label, "test")])


@pytest.mark.parametrize("name", ["ro\nad", "a\u2028b", " road", "", "\t"])
def test_a_class_name_that_labels_txt_cannot_hold(spec, name):
    for key in ("classes", "edge_classes"):
        with pytest.raises(PackError, match="of one line"):
            dataclasses.replace(spec, **{key: (name, *spec.classes[1:])})
    assert dataclasses.replace(spec, classes=("道路 1", *spec.classes[1:])).classes[0] == "道路 1"


def test_arguments_do_not_say_twice_what_is_said_elsewhere(spec):
    with pytest.raises(PackError, match="'classes'"):
        dataclasses.replace(spec, arguments={"classes": 3})


@pytest.mark.parametrize("width", [-3, "a", 1.5, [8]])
def test_arguments_that_make_no_network(spec, width):
    with pytest.raises(PackError, match="refuses its arguments"):
        dataclasses.replace(spec, arguments={"width": width}).create()


def test_files_that_are_nested_too_deeply_or_lie(path):
    (path / "model.toml").write_text("schema = 1\na = " + "[" * 100_000)
    refuses(path, "is not TOML")


def test_an_archive_with_a_flipped_bit(path):
    file = path / "reference.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    refuses(path, "reference.npz cannot be read")
