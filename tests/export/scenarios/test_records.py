"""Records that somebody made: texts no encoding holds, numbers no machine holds, files of gigabytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.build import main as build_main
from export.inspect import main as inspect_main
from export.refit import main as refit_main
from runtime.repository.manifest import digest

ROOT = Path(__file__).resolve().parents[3]
GIGABYTES = 2 << 30


def relu(path):
    info = helper.make_tensor_value_info
    values = [info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def sparse(path):
    """A file that takes no room and has 2 GB."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(GIGABYTES)


def one_line(capsys, code):
    out, err = capsys.readouterr()
    assert code == 1, out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


class TestPacks:
    @pytest.fixture
    def copy(self, pack, tmp_path):
        shutil.copytree(pack.path, tmp_path / "pack")
        return tmp_path / "pack"

    def tried(self, capsys, copy, tmp_path):
        said = one_line(capsys, inspect_main([str(copy)]))
        one_line(capsys, build_main([str(copy), "--repository", str(tmp_path / "repo")]))
        assert not (tmp_path / "repo").exists()
        return said

    def test_a_description_of_two_gigabytes(self, copy, tmp_path, capsys):
        sparse(copy / "model.toml")
        assert "model.toml has more than 16 MiB" in self.tried(capsys, copy, tmp_path)

    def test_an_index_of_two_gigabytes(self, copy, tmp_path, capsys):
        (copy / "replay").mkdir()
        sparse(copy / "replay" / "index.json")
        assert "index.json has more than 16 MiB" in self.tried(capsys, copy, tmp_path)

    def test_names_that_no_encoding_holds(self, copy, tmp_path, capsys):
        (copy / "replay").mkdir()
        entry = {"frame": "\ud800.png", "label": "l.png", "split": "train"}
        (copy / "replay" / "index.json").write_text(json.dumps([entry]))
        assert r"'\ud800.png' is missing" in self.tried(capsys, copy, tmp_path)

    @pytest.mark.parametrize("name", ["prior", "reference"])
    def test_statistics_that_unpack_to_gigabytes(self, name, copy, tmp_path, capsys):
        file = zipfile.ZipFile(copy / f"{name}.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        header = {"descr": "|u1", "fortran_order": False, "shape": (12, 1 << 28)}
        with file as archive, archive.open("share.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(257):
                member.write(bytes(1 << 20))
        assert f"{name}.npz unpacks to more than" in self.tried(capsys, copy, tmp_path)

    @pytest.mark.parametrize(
        ("line", "other"),
        [
            ("size = [", f"size = [{10**30}, {10**30}]"),
            ("mean = [", f"mean = [{10**400}, 0.5, 0.5]"),
            ("colours = [", f"colours = [[{10**30}, 0, 0]]"),
            ("width = ", f"width = {10**30}"),
            ("width = ", "width = " + "9" * 5000),
        ],
    )
    def test_numbers_that_no_machine_holds(self, line, other, copy, tmp_path, capsys):
        import tomllib

        text = (copy / "model.toml").read_text()
        key = line.split(" ")[0]
        values = tomllib.loads(text)
        if key == "width":
            text = text.replace(f"width = {values['arguments']['width']}", other)
        else:
            start = text.index(line)
            end = text.index("\n]\n", start) + 3
            text = text[:start] + other + "\n" + text[end:]
        (copy / "model.toml").write_text(text)
        self.tried(capsys, copy, tmp_path)


class TestVersions:
    @pytest.fixture
    def version(self, tmp_path):
        words = [
            "--onnx",
            str(relu(tmp_path / "m.onnx")),
            "--name",
            "m",
            "--repository",
            str(tmp_path / "repo"),
        ]
        assert build_main(words) == 0
        return tmp_path / "repo" / "m" / "1"

    def altered(self, version, **changes):
        manifest = json.loads((version / "manifest.json").read_text()) | changes
        with contextlib.suppress(ValueError):
            manifest["digest"] = digest(manifest)
        (version / "manifest.json").write_text(json.dumps(manifest))

    def test_a_manifest_of_two_gigabytes(self, version, pack, capsys):
        sparse(version / "manifest.json")
        capsys.readouterr()
        assert "more than 16 MiB" in one_line(capsys, inspect_main([str(version)]))
        words = ["m", "1", str(pack.path), "--repository", str(version.parent.parent)]
        one_line(capsys, refit_main(words))

    @pytest.mark.parametrize("where", ["created", "classes", "parity"])
    def test_texts_that_no_encoding_holds(self, where, version, capsys):
        self.altered(
            version, **{where: {"created": "\ud800", "classes": ["\udfff"], "parity": {"\ud800": 1}}[where]}
        )
        capsys.readouterr()
        one_line(capsys, inspect_main([str(version)]))

    def test_numbers_over_64_bits_are_refused(self, version, capsys):
        self.altered(version, created=10**40, parity={"frames": 10**40, "agreement": 10**40})
        capsys.readouterr()
        for more in ([], ["--json"]):
            assert "beyond 64 bits" in one_line(capsys, inspect_main([str(version), *more]))


def test_a_file_whose_name_is_no_text(tmp_path):
    """Any bytes are a name on Linux; outputs are texts."""
    file = os.fsencode(tmp_path) + b"/caf\xe9.onnx"
    os.rename(relu(tmp_path / "m.onnx"), file)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    commands = [
        ["export.inspect", file],
        ["export.inspect", file, "--json"],
        ["export.build", "--onnx", file, "--name", "m", "--repository", str(tmp_path / "repo")],
        ["export.inspect", str(tmp_path / "repo" / "m" / "1")],
    ]
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-m", *words], env=environment, capture_output=True, cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, b""), words
        done.stdout.decode()
