"""bench.gpu where there is no GPU: it says so as JSON; torch and ONNX Runtime are tried on the CPU."""

from __future__ import annotations

import fcntl
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import gpu
from export.graph.contract import Contract
from runtime.engines.cuda import context
from tests.waits import until


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(library: str = "") -> context.Probe:
        raise context.CudaError("no CUDA driver here")

    monkeypatch.setattr(context, "probe", absent)


def test_on_the_cpu_torch_and_onnxruntime_agree(no_device: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--network", "roadnet", "--size", "32x64", "--runs", "1", "--in-process"]
    code = gpu.main([*words, "--json"])
    report = json.loads(capsys.readouterr().out)
    parts = report["networks"]["roadnet"]
    assert code == 0
    assert report["executed"] == 2
    assert parts["torch"]["fp32"]["agreement"]["labels"] > 0.99
    assert parts["onnxruntime"]["fp32"]["agreement"]["confidence_max"] <= 1
    assert "CUDA device" in parts["tensorrt"]["absent"]
    assert report["cuda"] == {"absent": "no CUDA driver here"}


def test_edges_and_labels_of_a_joint_network_are_compared(no_device: None) -> None:
    case = gpu.Case.make("espnetv2_edges:joint", (32, 64), 1)
    assert case.outputs == ("labels", "confidence", "edges", "edge_bits")
    for name in ("torch", "onnxruntime"):
        found = gpu.PARTS[name](case, "cpu", 1)["fp32"]["agreement"]
        assert found["labels"] > 0.99
        assert found["edge_bits"] > 0.99
        assert found["edges_max"] <= 1


def test_without_a_device_nothing_is_executed_and_the_code_is_1(
    no_device: None, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["--part", "tensorrt", "--part", "tensorrt-refit", "--in-process"]
    code = gpu.main(["--size", "32x64", "--network", "roadnet", *parts, "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (code, report["executed"]) == (1, 0)
    assert {p["absent"] for p in report["networks"]["roadnet"].values()} == {"no CUDA driver here"}
    assert "roadnet tensorrt: no CUDA driver here" in printed.err


def test_a_part_that_breaks_is_reported_and_fails_the_run(
    no_device: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> dict[str, object]:
        raise ValueError("half of it")

    monkeypatch.setitem(gpu.PARTS, "onnxruntime", broken)
    parts = ["--part", "onnxruntime", "--in-process"]
    assert gpu.main(["--device", "cpu", "--network", "roadnet", "--size", "32x64", *parts, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["networks"]["roadnet"]["onnxruntime"] == {"error": "ValueError: half of it"}


def test_parts_are_asked_for_one_by_one_and_a_crash_hides_nothing(
    no_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def guarded(command: list[str], limit: float) -> dict[str, object]:
        words = command[command.index("--network") :]
        asked.append(words)
        assert ("--in-process" in words, limit) == (True, 5)
        if "torch" in words:
            return {"error": "ended by SIGSEGV"}
        return {"networks": {"roadnet": {"onnxruntime": {"fp32": {}}}}}

    monkeypatch.setattr(gpu, "guarded", guarded)
    words = ["--network", "roadnet", "--size", "32x64", "--limit", "5", "--out", str(tmp_path / "gpu.json")]
    assert gpu.main([*words, "--part", "torch", "--part", "onnxruntime"]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["executed"] == 1
    assert report["networks"]["roadnet"]["torch"] == {"error": "ended by SIGSEGV"}
    assert [words[3] for words in asked] == ["torch", "onnxruntime"]


@pytest.mark.slow
def test_a_part_is_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--network", "roadnet", "--size", "32x64", "--runs", "1"]
    assert gpu.main([*words, "--part", "onnxruntime", "--out", str(tmp_path / "gpu.json")]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["executed"] == 1
    assert report["networks"]["roadnet"]["onnxruntime"]["fp32"]["agreement"]["labels"] > 0.99


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import sys; sys.exit('no library')", "exit code 1; last said: no library"),
        ("print('no JSON')", "exit code 0; last said:"),
        ("print('[]')", "without a report"),
    ],
)
def test_a_process_that_ends_otherwise_is_an_error_of_its_part(script: str, says: str) -> None:
    assert says in gpu.guarded([sys.executable, "-c", script], 120)["error"]


def test_a_process_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """Both hold a lock for as long as they live, and neither ends by itself."""
    script = (
        "import fcntl, subprocess, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "wait = [sys.executable, '-c', 'import time; time.sleep(3600)']\n"
        "subprocess.run(wait, pass_fds=[file.fileno()])"
    )
    lock = tmp_path / "lock"
    assert "still running after 1 s" in gpu.guarded([sys.executable, "-c", script, str(lock)], 1)["error"]
    with lock.open("a") as file:

        def free() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        until(free)


@pytest.mark.parametrize("words", [["--network", "nope"], ["--size", "2"], ["--runs", "0"], ["--limit", "0"]])
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(words)
    assert ended.value.code == 2


def test_agreement_is_counted_in_pixels() -> None:
    answers = {"labels": np.zeros((1, 2, 2), np.uint8), "confidence": np.full((1, 2, 2), 200, np.uint8)}
    contract = Contract("segmentation", ("a", "b"))
    case = gpu.Case(contract, None, None, None, None, answers)  # type: ignore[arg-type]
    other = {
        "labels": np.array([[[0, 1], [0, 0]]], np.uint8),
        "confidence": np.array([[[200, 190], [255, 200]]], np.uint8),
    }
    assert gpu.agreement(case, other) == {"labels": 0.75, "confidence_max": 55, "confidence_mean": 16.25}
