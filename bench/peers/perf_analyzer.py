"""NVIDIA's perf_analyzer, unmodified, out of the tritonclient 2.41.0 wheel.

The binary wants libb64.so.0d (Debian: libb64-0d) and the CUDA runtime's shared library; neither needs a GPU.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.peers import environments

_THROUGHPUT = re.compile(r"Throughput: ([\d.]+) infer/sec")
_LATENCY = re.compile(r"Avg latency: (\d+) usec")


def command() -> tuple[Path, dict[str, str]]:
    """The binary and the environment variables it wants; raises environments.Absent."""
    environment = environments.find("perf")
    binary = environment / "bin" / "perf_analyzer"
    if not binary.is_file():
        raise environments.Absent(f"{binary} is missing: install tritonclient[all]==2.41.0 there")
    libraries = [environments.site_packages(environment) / "nvidia" / "cuda_runtime" / "lib"]
    # Either installed, or unpacked below the environment with `dpkg -x libb64-0d_*.deb ENVIRONMENT/b64`.
    beside = sorted(environment.glob("b64/**/libb64.so.0d"))
    if beside:
        libraries.append(beside[0].parent)
    elif ctypes.util.find_library("b64") is None:
        raise environments.Absent(
            f"perf_analyzer needs libb64.so.0d: apt-get install libb64-0d, or unpack it in {environment}"
        )
    path = ":".join([*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")])
    return binary, {**os.environ, "LD_LIBRARY_PATH": path}


def run(arguments: Sequence[str], *, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """perf_analyzer with these arguments; its output is text, errors included."""
    binary, environment = command()
    return subprocess.run(
        [str(binary), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def figures(output: str) -> tuple[float, float]:
    """(requests per second, mean latency in ms) of its report; raises ValueError where it has none."""
    throughput, latency = _THROUGHPUT.search(output), _LATENCY.search(output)
    if throughput is None or latency is None:
        raise ValueError(f"no figures in perf_analyzer's report: {output[-500:]}")
    return float(throughput[1]), float(latency[1]) / 1000.0
