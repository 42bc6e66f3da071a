"""Checkpoints of trainers: what lies beside the weights, what is damaged, and what would become too large."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import os
import pathlib
import re
import types
import zipfile

import numpy as np
import pytest
import torch

from networks.checkpoints.archive import Ignored, records
from networks.import_checkpoint import CheckpointError, main, normalisation, read_state
from networks.pack import PackError, load_pack

WEIGHTS = {"conv.weight": torch.arange(100.0).reshape(10, 10)}


def filled() -> collections.defaultdict[str, list[int]]:
    result: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
    result["lr"].append(1)
    return result


BESIDE = {
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "int64": np.int64(3),
    "bool": np.bool_(True),
    "str": np.str_("best"),
    "array": np.eye(3),
    "Fortran's": np.asfortranarray(np.ones((2, 3))),
    "objects": np.array([1, "a"], object),
    "records": np.zeros(2, [("a", "f4")]),
    "dtype": np.dtype("float32"),
    "type": np.float32,
    "day": np.datetime64("2026-01-01"),
    "state": np.random.RandomState(0).get_state(),
    "generator": np.random.default_rng(0),
    "arguments": argparse.Namespace(lr=0.1, sizes=[1, 2]),
    "namespace": types.SimpleNamespace(a=1),
    "time": datetime.datetime(2026, 1, 1),
    "path": pathlib.Path("runs/1"),
    "defaults": filled(),
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "set": {1, 2},
    "complex": 1j,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_trainers_keep_beside_the_weights_is_passed_over(beside, zipped, tmp_path):
    file = tmp_path / "c.pth"
    content = {"state_dict": WEIGHTS, "beside": BESIDE[beside], "epoch": 3}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    state = read_state(file)
    assert state.keys() == WEIGHTS.keys()
    assert torch.equal(state["conv.weight"], WEIGHTS["conv.weight"])


class Calls:
    def __init__(self, what, *given):
        self.call = (what, given)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        Calls(os.system, "touch executed"),
        Calls(eval, "open('executed', 'w')"),
        Calls(np.save, "executed.npy", 1),
        Calls(np.load, "executed.npy"),
        Calls(__import__, "os"),
    ],
)
@pytest.mark.parametrize("deep", [True, False])
def test_what_would_be_called_is_refused_by_name(call, deep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.pth"
    beside = [{"x": (1, call)}] if deep else call
    torch.save({"state_dict": WEIGHTS, "beside": beside, "best": np.float64(1)}, file)
    with pytest.raises(CheckpointError, match=r"would execute code when loaded \(it names .*safetensors"):
        read_state(file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pth"]


def test_names_that_are_passed_over_stand_for_nothing_of_their_own():
    functions = {entry[0].__name__ for entry in records()}
    assert functions == {"Ignored", "_mapping"}
    thing = Ignored(1, a=2)
    thing.__setstate__({"a": 1})
    assert vars(thing) == {}


def test_the_list_holds_for_this_file_alone(tmp_path):
    torch.save({"state_dict": WEIGHTS, "best": np.float64(1)}, tmp_path / "c.pth")
    before = set(torch.serialization.get_safe_globals())  # torch's own list has no order
    read_state(tmp_path / "c.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def rewritten(file, method):
    with zipfile.ZipFile(file) as source:
        content = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(file, "w", method) as target:
        for name, data in content.items():
            target.writestr(name, data)
    return file


class TestArchives:
    @pytest.fixture
    def file(self, tmp_path):
        torch.save(WEIGHTS, tmp_path / "c.pth")
        return tmp_path / "c.pth"

    def test_a_changed_weight_does_not_have_its_checksum(self, file):
        content = bytearray(file.read_bytes())
        content[content.index(WEIGHTS["conv.weight"].numpy().tobytes()[:40]) + 21] ^= 1
        file.write_bytes(content)
        assert not torch.equal(torch.load(file)["conv.weight"], WEIGHTS["conv.weight"])  # torch says nothing
        with pytest.raises(CheckpointError, match=r"record 'c/data/0' does not have its checksum"):
            read_state(file)

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    def test_records_packed_by_another_program(self, file, method):
        rewritten(file, method)
        if method == zipfile.ZIP_BZIP2:  # which torch does not know
            with pytest.raises(CheckpointError, match="cannot be read"):
                read_state(file)
        else:
            assert torch.equal(read_state(file)["conv.weight"], WEIGHTS["conv.weight"])

    def test_a_changed_record_that_is_packed(self, file):
        rewritten(file, zipfile.ZIP_DEFLATED)
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 0xFF
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is damaged|cannot be read") as caught:
            read_state(file)
        assert "\n" not in str(caught.value)

    def test_a_record_that_unpacks_to_gigabytes(self, tmp_path):
        file = tmp_path / "bomb.pth"
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
            target.open("b/data/0", "w") as record,
        ):
            for _ in range(256):
                record.write(bytes(1 << 20))
        with pytest.raises(CheckpointError, match=r"unpacks to 256 MiB"):
            read_state(file)

    def test_two_records_of_one_name(self, file):
        with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as target:
            target.writestr("c/data/0", bytes(400))
        with pytest.raises(CheckpointError, match="two records have one name"):
            read_state(file)

    @pytest.mark.parametrize("kept", [0.2, 0.6, 0.95])
    def test_a_file_that_ends_early(self, file, kept):
        content = file.read_bytes()
        file.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_state(file)


class TestSizes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.bool])
    def test_one_value_that_claims_terabytes(self, dtype, tmp_path):
        torch.save({"a": torch.zeros(1, dtype=dtype).expand(1 << 20, 1 << 20)}, tmp_path / "c.pth")
        with pytest.raises(CheckpointError, match=r"repeats few values to \d+ MiB \(most of it 'a'\)"):
            read_state(tmp_path / "c.pth")

    def test_many_names_of_one_storage(self, tmp_path):
        one = torch.zeros(1 << 20)
        torch.save({f"w{k}": one for k in range(1000)}, tmp_path / "c.pth")
        with pytest.raises(CheckpointError, match="repeats few values"):
            read_state(tmp_path / "c.pth")

    def test_shared_weights_and_small_repeats_are_taken(self, tmp_path):
        one = torch.randn(1000, 1000)
        state = {"a": one, "b": one, "c": one.t(), "places": torch.arange(512).expand(4, 512)}
        torch.save(state, tmp_path / "c.pth")
        assert all(torch.equal(read_state(tmp_path / "c.pth")[name], state[name]) for name in state)


class TestNormalisation:
    @pytest.mark.parametrize(
        ("mean", "std"),
        [
            ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
            ((123.675, 116.28, 103.53), (0.229, 0.224, 0.225)),
            ((0.485, 0.456, 0.406), (58.395, 57.12, 57.375)),
            ((0.485, 0.456, 1.406), (0.229, 0.224, 0.225)),
            ((-0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ((float("nan"), 0.456, 0.406), (0.229, 0.224, 0.225)),
        ],
    )
    def test_what_is_not_of_channels_from_0_to_1_is_refused(self, mean, std, tmp_path, capsys, spec):
        words = ["roadnet", "x.pth", "--classes", "street", "--out", str(tmp_path / "p")]
        words += ["--mean=" + ",".join(map(str, mean)), "--std=" + ",".join(map(str, std))]
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        assert "--of-255" in capsys.readouterr().err
        if mean == mean:
            with pytest.raises(PackError, match=r"scaled to 0\.\.1|finite"):
                dataclasses.replace(spec, mean=mean, std=std)

    def test_bytes_are_converted_where_it_is_said(self):
        mean, std = normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), of_255=True)
        assert mean == pytest.approx((0.485, 0.456, 0.406))
        assert std == pytest.approx((0.229, 0.224, 0.225))
        assert normalisation((104, 117, 123), (1, 1, 1), of_255=True)[1] == pytest.approx((1 / 255,) * 3)

    @pytest.mark.parametrize(
        ("mean", "std"),
        [
            ((0.485, 0.456, 0.406), (58, 57, 57)),
            ((123, 116, 103), (0.2, 0.2, 0.2)),
            ((300, 1, 1), (58, 57, 57)),
        ],
    )
    def test_what_is_not_of_bytes_is_refused_as_such(self, mean, std):
        with pytest.raises(ValueError, match="which --of-255 says"):
            normalisation(mean, std, of_255=True)


class TestHeads:
    def file(self, tmp_path, network, classes, **arguments):
        import networks

        torch.save(networks.create(network, classes=classes, **arguments).state_dict(), tmp_path / "c.pth")
        return tmp_path / "c.pth"

    def run(self, tmp_path, network, space, *words):
        return main(
            [network, str(tmp_path / "c.pth"), "--classes", space, "--out", str(tmp_path / "p"), *words]
        )

    def test_the_published_twentieth_output_is_left_out_by_name(self, tmp_path, capsys):
        self.file(tmp_path, "espnetv2", 20, scale=0.5)
        assert self.run(tmp_path, "espnetv2", "cityscapes19") == 0
        said = (
            "'bu_dec_l4.merge_layer.3.weight' has 20 outputs for 19 classes of cityscapes19: "
            "the last 1 left out"
        )
        assert capsys.readouterr().err == f"note: {said}\n"
        assert said in load_pack(tmp_path / "p").spec.training

    @pytest.mark.parametrize("space", ["camvid11", "street"])
    @pytest.mark.parametrize("more", [1, 2, -1])
    def test_any_other_number_of_outputs_is_refused(self, space, more, tmp_path, capsys):
        classes = {"camvid11": 11, "street": 12}[space] + more
        self.file(tmp_path, "espnetv2", classes, scale=0.5)
        assert self.run(tmp_path, "espnetv2", space) == 1
        assert f"its head has {classes} outputs" in capsys.readouterr().err
        assert not (tmp_path / "p").exists()

    @pytest.mark.parametrize(
        ("network", "arguments"),
        [
            ("roadnet", {"width": 8}),
            ("ddrnet", {"width": 8, "pyramid": 8}),
            ("casenet_light", {}),
            ("pidnet", {"width": 8, "pyramid": 8, "head": 8}),
            ("fcn8s", {"width": 2}),
            ("deeplabv2", {"depth": 50, "width": 8}),
            ("espnetv2_edges", {"scale": 0.5}),
        ],
    )
    @pytest.mark.parametrize("more", [1, -1])
    def test_other_networks_refuse_too(self, network, arguments, more, tmp_path, capsys):
        import networks

        known = networks.architecture(network).EXAMPLES[0] if network != "roadnet" else arguments
        self.file(tmp_path, network, 12 + more, **known)
        words = [f"--set={key}={value}".replace("'", '"') for key, value in known.items()]
        assert self.run(tmp_path, network, "street", *words) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert re.search(rf"\b{12 + more} (outputs|classes)|the number of classes", said)
        assert not (tmp_path / "p").exists()
