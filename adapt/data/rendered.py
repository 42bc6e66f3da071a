"""The procedural renderer as a data set: frame i of a domain is the scene of seed first+i."""

from __future__ import annotations

import numpy as np

from adapt.data.base import DataError

__all__ = ["Rendered"]


class Rendered:
    """`count` rendered street scenes of one domain, with exact labels.

    Raises:
        DataError: no such domain, or a negative number.
    """

    def __init__(
        self, domain: str, count: int = 64, first_seed: int = 0, *, size: tuple[int, int] = (128, 256)
    ) -> None:
        from adapt.data.street import scenes

        if domain not in scenes.DOMAINS:
            raise DataError(
                f"there is no rendered domain {domain!r}: choose one of {', '.join(scenes.DOMAINS)}"
            )
        if count < 0 or first_seed < 0:
            raise DataError(f"{count} frames from street {first_seed}: neither can be negative")
        self.domain, self.count, self.first, self.size = domain, int(count), int(first_seed), size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        from adapt.data.street import scenes

        if not 0 <= i < self.count:
            raise IndexError(i)
        frame, label = scenes.render(self.first + i, self.domain, self.size)
        return frame, label

    def name(self, i: int) -> str:
        return f"{self.domain}_{self.first + i:06d}"
