"""Two thousand mutated bodies, a fiftieth of what the torture sends."""

from __future__ import annotations

from pathlib import Path

from tests.torture import fuzz
from tests.torture.figures import Setting


async def test_every_mutated_body_gets_the_answer_that_another_reading_of_the_contract_gives(
    tmp_path: Path, seed: int
) -> None:
    figures = await fuzz.run(Setting(seed, 0.02, tmp_path))
    assert [figure for figure in figures if not figure.met] == []
