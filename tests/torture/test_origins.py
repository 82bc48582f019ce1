"""Two files of each of the torture's hostile kinds."""

from __future__ import annotations

from pathlib import Path

from tests.torture import origins
from tests.torture.figures import Setting


async def test_every_kind_of_hostile_origin_ends_in_time_with_its_reason_and_harms_no_other_file(
    tmp_path: Path, seed: int
) -> None:
    figures = await origins.run(Setting(seed, 0.1, tmp_path))
    assert [figure for figure in figures if not figure.met] == []
