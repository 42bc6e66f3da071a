"""The frame of every round of adaptation: open, run, finish.

    open     identity of the round (pack, settings, frames), and what the folder holds of it
    run      the stages of the subclass; a pause or a kill loses at most the work since the last checkpoint
    finish   report.json and, if the round was accepted, pack/ (its parent is the released pack)

A subclass gives the stages.  Knows no network, no gate and no service.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from adapt.data.base import DataError, read_frame, read_label
from adapt.round.labelling import LabelFolder, Labels
from adapt.round.outcome import RoundPaused, RoundResult
from adapt.round.state import RoundState
from common.files import write_json
from common.progress import Progress
from networks.pack import Pack, PackError, PackSpec, load_pack, write_pack

__all__ = ["AdaptationRound", "Pair", "array_digest", "refuse_evaluation_frames", "spread"]

Pair = tuple[np.ndarray, np.ndarray]


def array_digest(array: np.ndarray) -> bytes:
    """SHA-256 of an array's bytes, without its shape."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def spread(pairs: list[Pair], most: int) -> list[Pair]:
    """Return at most `most` pairs, evenly over the list; all if `most` is 0."""
    if not most or len(pairs) <= most:
        return pairs
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, most).round().astype(int)]


def refuse_evaluation_frames(
    frames: Sequence[np.ndarray], holdouts: Mapping[str, Sequence[Pair]], error: type[Exception]
) -> None:
    """Raise `error` if a frame that the gate judges by is also among the frames that are learnt from."""
    seen = {array_digest(frame): i for i, frame in enumerate(frames)}
    for name, pairs in holdouts.items():
        for i, (frame, _) in enumerate(pairs):
            if (at := seen.get(array_digest(frame))) is not None:
                raise error(
                    f"target frame {at} is also frame {i} of the {name} hold-out: take it out of one of them"
                )


class AdaptationRound(ABC):
    """One round in one folder.  Call `run` once.

    Args:
        pack: the released parent.
        frames: uint8 [H,W,3], as they are learnt from; part of the identity.
        config: a dataclass; its fields are part of the identity, but for those in `NOT_LEARNT`.  Its field
            `force` writes the pack whatever the gate decides.
        out: the folder of this round.
        progress: called as `adapt.train.trainer.Progress`; may raise RoundPaused.
    """

    #: Settings that change nothing that is learnt.
    NOT_LEARNT: ClassVar[tuple[str, ...]] = ("force",)

    def __init__(
        self, pack: Pack, frames: Sequence[np.ndarray], config: Any, out: Path, progress: Progress
    ) -> None:
        self.pack, self.frames, self.config, self.out, self.progress = pack, frames, config, out, progress
        self.state = RoundState(out)

    @property
    def spec(self) -> PackSpec:
        return self.pack.spec

    # ------------------------------------------------------------------------------------ for subclasses
    @abstractmethod
    def _extend_identity(self, digest: Any) -> None:
        """Update the hash `digest` with what else changes the weights of this kind of round."""

    @abstractmethod
    def _replace_other_round(self) -> None:
        """The folder holds another round, or nothing: make room for this one, or raise."""

    @abstractmethod
    def _stages(self) -> RoundResult:
        """Run every stage that is not in `state.stages` yet, and return what `_conclude` returns."""

    # --------------------------------------------------------------------------------------------- open
    @cached_property
    def identity(self) -> str:
        """64 hex digits: equal if and only if pack, settings and data are equal."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in self.NOT_LEARNT}
        content = json.dumps([self.pack.sha256, settings], sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode())
        for frame in self.frames:
            digest.update(array_digest(frame))
        self._extend_identity(digest)
        return digest.hexdigest()

    def _open(self) -> None:
        if not self.state.read(self.identity):
            self._replace_other_round()
        self.out.mkdir(parents=True, exist_ok=True)
        self.state.resumed += 1
        self.state.save()

    # ---------------------------------------------------------------------------------------------- run
    def run(self) -> RoundResult:
        """Run the round, or what is left of it.  Raises RoundPaused if a progress callback stops it."""
        self._open()
        finished = self._finished()
        if finished is not None:
            return finished
        try:
            return self._stages()
        except RoundPaused:
            self.state.save()
            raise

    def _finished(self) -> RoundResult | None:
        """The result of a round that reached its end, else None."""
        report = self.state.report
        if report is None:
            return None
        try:
            wanted = report["accepted"] or self.config.force
            pack = load_pack(self.out / "pack") if wanted else None
        except (PackError, OSError):  # the pack is gone or damaged: the last stages are run again
            return None
        write_json(self.out / "report.json", report)  # a kill may have come before it was written
        return RoundResult(pack, bool(report["accepted"]), report)

    def _stored_labels(self, key: str, folder: Path, count: int, make: Callable[[], Labels]) -> Labels:
        """The labels of the stage `key`: from `folder` if they are there, else made and stored.

        Args:
            count: frames that have a label.
        """
        store = LabelFolder(folder)
        if key in self.state.stages:
            try:
                return store.read(count, self.state.stages[key])
            except DataError:  # a damaged file costs time, nothing else
                del self.state.stages[key]
        with self.state.timed("label"):
            labels = make()
            store.write(labels)
        self.state.stages[key] = labels.record
        self.state.save()
        return labels

    # ------------------------------------------------------------------------------------------- finish
    def _conclude(self, report: dict[str, Any], pack: Pack | None) -> RoundResult:
        """Write the report, and remove what only an unfinished round needs."""
        if pack is not None:
            report["pack"] = pack.sha256
        self.state.report = report
        self.state.save()
        write_json(self.out / "report.json", report)
        (self.out / "checkpoint.pt").unlink(missing_ok=True)
        shutil.rmtree(self.out / "checkpoint.pt.labels", ignore_errors=True)
        return RoundResult(pack, bool(report["accepted"]), report)

    def _write_pack(self, make: Callable[[], dict[str, Any]]) -> Pack:
        """Write `pack/`, with the parent's prior.

        Args:
            make: returns the other arguments of `write_pack`; called only if there is no pack yet.
        """
        path = self.out / "pack"
        if path.is_dir():  # killed between the rename and the report: the same content by construction
            try:
                return load_pack(path)
            except PackError:
                shutil.rmtree(path)
        return write_pack(path, **make(), prior=self.pack.prior())

    def _parents_replay(self) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
        """Yield (frame, label, split) of the parent's replay set."""
        for split in ("train", "holdout"):
            for frame, label in self.pack.replay(split):
                yield read_frame(frame), read_label(label), split

    def _seconds(self) -> dict[str, float]:
        return {key: round(value, 2) for key, value in self.state.seconds.items()}

    @staticmethod
    def _now() -> str:
        return datetime.now(UTC).isoformat(timespec="seconds")
