"""Settings every test shares: one thread a library, and where the real frames are."""

from __future__ import annotations

import os

# Before numpy, torch or onnxruntime are imported: on two cores their pools fight each other.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# How long an example takes says nothing on a machine that is busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


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
