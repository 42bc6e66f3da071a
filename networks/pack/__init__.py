"""The model pack: weights, description and reference data of a trained network in one directory."""

from __future__ import annotations

from networks.pack.pack import (
    SCHEMA,
    SPLITS,
    TASKS,
    Pack,
    PackError,
    PackSpec,
    check_state,
    load_pack,
    normalise,
    one_line,
    tree_hash,
    write_pack,
)

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
