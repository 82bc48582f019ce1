"""What a part of the torture gives: figures, each with what was asked of it, what was seen, and the raw counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """What a part is run with. `scale` multiplies its rounds, bodies or seconds: 1.0 is what the README publishes.

    `seed` makes everything that is drawn the same again; `work` is an empty directory of the part's own.
    """

    seed: int
    scale: float
    work: Path

    def times(self, number: int) -> int:
        """So many rounds, bodies or seconds, at this scale; at least one."""
        return max(1, round(number * self.scale))


@dataclass(frozen=True)
class Figure:
    """One line of the table. `wanted` and `seen` are for people, `counts` are the raw numbers behind `seen`."""

    name: str
    wanted: str
    seen: str
    met: bool
    counts: Mapping[str, float] = field(default_factory=dict)
