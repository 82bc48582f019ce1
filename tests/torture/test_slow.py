"""The torture's slow sockets, for a few seconds."""

from __future__ import annotations

from pathlib import Path

from tests.torture import slow
from tests.torture.figures import Setting


async def test_500_slow_sockets_are_cut_off_in_time_and_keep_no_honest_caller_waiting(
    tmp_path: Path, seed: int
) -> None:
    figures = await slow.run(Setting(seed, 0.1, tmp_path))
    assert [figure for figure in figures if not figure.met and "p99" not in figure.name] == []
