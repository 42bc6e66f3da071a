"""Settings every test shares: one thread a library, and where the real frames are."""

from __future__ import annotations

import os

# Before numpy, torch or onnxruntime are imported: on two cores their pools fight each other.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# How long an example takes, or is looked for, says nothing on a machine that is busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Keeps one failure one failure.

    A test that fails leaves files, processes and threads behind.  Python warns of them when it collects them,
    which is in the middle of another test.  From the first failure on such a warning is no error.
    """
    if call.excinfo is not None and not isinstance(call.excinfo.value, pytest.skip.Exception):
        for name in ("PytestUnraisableExceptionWarning", "PytestUnhandledThreadExceptionWarning"):
            item.session.add_marker(pytest.mark.filterwarnings(f"default::pytest.{name}"))


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real driving frames, or a skip that says how to get it."""
    here = Path(__file__).resolve().parent.parent
    root = Path(os.environ.get("ROADWORTHY_DATA", here.parent / "shared" / "data"))
    if not (root / "camvid" / "day_train.txt").is_file():
        pytest.skip(f"no real driving frames at {root}: set ROADWORTHY_DATA to a folder that holds camvid/")
    return root
