"""The model pack: weights, description and reference data of a trained network in one directory."""

from __future__ import annotations

from common.text import one_line
from networks.pack.checks import SPLITS, check_state, tree_hash
from networks.pack.pack import Pack, load_pack, normalise, write_pack
from networks.pack.spec import SCHEMA, TASKS, PackError, PackSpec

__all__ = [
    "SCHEMA",
    "SPLITS",
    "TASKS",
    "Pack",
    "PackError",
    "PackSpec",
    "check_state",
    "load_pack",
    "normalise",
    "one_line",
    "tree_hash",
    "write_pack",
]
