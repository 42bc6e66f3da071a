"""The long run of bench.soak_serving, shortened: nothing lost, nothing leaked."""

from __future__ import annotations

import json

import pytest

from bench import soak_serving


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_requests_under_swaps_are_all_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    code = soak_serving.main(["--requests", "1500", "--every", "50"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0, report["kept"]
    assert report["sent"] == 30 * (50 // 4 * 4)
    assert report["swaps"] == 30
    assert report["versions_seen"] > 10
