"""The data of a round of segmentation: frames to learn from, and everything that is only measured on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image

from adapt.data.base import DataError, read_frame, read_label, resize_frame, resize_label
from adapt.gate.layout_prior import Layout
from adapt.labels.cbst import allowed_mask
from adapt.round.base import Pair, refuse_evaluation_frames, spread
from adapt.round.config import RoundConfig
from adapt.round.outcome import RoundError
from common.progress import Progress
from networks.pack import Pack

__all__ = ["RoundInputs", "Tags"]

Tags = Collection[int] | Collection[str] | np.ndarray


class RoundInputs:
    """Frames and labels of a round, all at the pack's size.

    Args: as `adapt.round.adapt`.

    Attributes:
        sizes: (H, W) that each frame had before it was resized.
        frames: all target frames, uint8 [H,W,3]; 0.5 MB per frame at 352x480.
        target, holdout: those that are learnt from, and those that only the gate sees.
        following: per hold-out frame the frame after it in time, or None.
        allowed: per frame of `target` the indices of the classes that may be in it, or None = all.
        replay, source_holdout: labelled source frames to learn from, and to measure on.
        labelled: the labelled target hold-out, may be empty.
        layout: where things are in the source's labels, or None if it is not known.
        valid: bool [H,W], False = no label there; None = labels everywhere.

    Raises:
        RoundError: too few frames, no replay though it is demanded, unknown tags, or a frame to learn from
            that is in a hold-out as well.
    """

    def __init__(
        self,
        pack: Pack,
        frames: Sequence[np.ndarray],
        config: RoundConfig,
        progress: Progress,
        allowed: Sequence[Tags | None] | None,
        labelled: Sequence[Pair],
    ) -> None:
        if len(frames) < 4:
            raise RoundError(f"a round needs at least 4 target frames, got {len(frames)}: collect more")
        if allowed is not None and len(allowed) != len(frames):
            raise RoundError(
                f"{len(allowed)} sets of tags for {len(frames)} frames: give one (or None) a frame"
            )
        self.pack, self.spec, self.config, self.progress = pack, pack.spec, config, progress
        size = pack.spec.size
        self.labelled = [(resize_frame(x, size), resize_label(y, size)) for x, y in labelled]
        self.sizes = [f.shape[:2] for f in frames]
        self.frames = [np.ascontiguousarray(resize_frame(f, size)) for f in frames]
        self._divide(allowed)
        self.replay = [] if config.source_free else self._read_replay("train")
        self.source_holdout = spread(self._read_replay("holdout"), config.source_holdout)
        if config.source_free is False and not self.replay:
            raise RoundError("the pack has no replay frames and source_free is False: allow it or add replay")
        holdouts = {"labelled": self.labelled, "source": self.source_holdout}
        refuse_evaluation_frames(self.frames, holdouts, RoundError)
        self.layout = self._layout()
        self.valid = self._valid_mask()

    def _divide(self, allowed: Sequence[Tags | None] | None) -> None:
        """Set the hold-out apart, evenly over the frames."""
        count = len(self.frames)
        aside = max(2, round(self.config.holdout * count))
        chosen = np.unique(np.linspace(0, count - 1, aside + 2)[1:-1].round().astype(int))
        self.holdout = [self.frames[i] for i in chosen]
        self.following = [self.frames[i + 1] if i + 1 < count else None for i in chosen]
        learnt = [i for i in range(count) if i not in set(chosen.tolist())]
        self.target = [self.frames[i] for i in learnt]
        tags = [None] * len(learnt) if allowed is None else [allowed[i] for i in learnt]
        if self.config.compat and any(t is not None for t in tags):
            raise RoundError(f"compat {self.config.compat!r}: that code knows no image tags")
        self.allowed = [self._classes_of(t) for t in tags]

    def _classes_of(self, tags: Tags | None) -> list[int] | None:
        """Indices of the classes that may be in a frame, without those that cannot be here; None = all."""
        classes = self.spec.classes
        unknown = [c for c in self.config.absent if c not in classes]
        if unknown:
            raise RoundError(f"absent: the pack has no class {unknown[0]!r}; it has {', '.join(classes)}")
        if tags is None and not self.config.absent:
            return None
        indices: Any = range(len(classes)) if tags is None else tags
        try:
            if not isinstance(indices, np.ndarray):
                indices = [classes.index(t) if isinstance(t, str) else t for t in indices]
            mask = allowed_mask(indices, len(classes))
        except (TypeError, ValueError) as error:
            raise RoundError(f"tags {tags!r}: {error}; the pack has {', '.join(classes)}") from error
        assert mask is not None
        return [i for i in np.flatnonzero(mask).tolist() if classes[i] not in self.config.absent]

    def _read_replay(self, split: str) -> list[Pair]:
        listed = self.pack.replay(split)
        if self.config.replay_limit:
            listed = listed[: self.config.replay_limit]
        pairs, size = [], self.spec.size
        for i, (frame, label) in enumerate(listed):
            try:
                x, y = read_frame(frame), read_label(label)
            except DataError as error:
                raise RoundError(f"pack {self.pack.path}: {error}") from error
            known = y[y != 255]
            if known.size and int(known.max()) >= len(self.spec.classes):
                raise RoundError(
                    f"pack {self.pack.path}: replay label {label.name} holds class {int(known.max())}, the "
                    f"pack has {len(self.spec.classes)}: write the pack again"
                )
            pairs.append((resize_frame(x, size), resize_label(y, size)))
            self.progress(f"read replay ({split})", i + 1, len(listed))
        return pairs

    def _valid_mask(self) -> np.ndarray | None:
        bottom, border = self.config.ignore_bottom, self.config.ignore_border
        if not bottom and not border:
            return None
        mask = np.ones(self.spec.size, bool)
        if border:
            mask[:border], mask[-border:], mask[:, :border], mask[:, -border:] = False, False, False, False
        if bottom:
            mask[-bottom:] = False
        if not mask.any():
            raise RoundError(
                f"ignore_bottom {bottom} and ignore_border {border} leave nothing of a frame of "
                f"{self.spec.size}: lower them"
            )
        return mask

    def _layout(self) -> Layout | None:
        labels = [y for _, y in [*self.replay, *self.source_holdout]]
        if labels:
            return Layout.of_labels(labels, len(self.spec.classes))
        prior, share = self.pack.prior(), self.pack.reference().get("share")
        return None if prior is None or share is None else Layout.of_prior(prior, share)

    def source_share(self) -> np.ndarray | None:
        """float64 [C]: class shares of the source's labels, or of the pack's reference; None = not known."""
        labels = [y for _, y in (self.replay or self.source_holdout)]
        if not labels:
            share = self.pack.reference().get("share")
            return None if share is None else np.asarray(share, np.float64)
        counts = sum(np.bincount(y.reshape(-1), minlength=256)[: len(self.spec.classes)] for y in labels)
        return np.asarray(counts / max(int(np.sum(counts)), 1))

    def prior(self) -> np.ndarray | None:
        """q_c(y,x) float32 [C,H,W] at the pack's size, or None if the settings do not ask for it."""
        if not self.config.prior:
            return None
        prior = self.pack.prior()
        if prior is None:
            raise RoundError("prior is asked for and the pack has no prior.npz: switch it off")
        size = self.spec.size[::-1]
        planes = [
            np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
            for plane in prior
        ]
        return np.asarray(np.clip(np.stack(planes), 0.0, 1.0))
