"""The torture's paced hosts, a tenth of their files; how fast they are is for `make torture` to say."""

from __future__ import annotations

from pathlib import Path

from tests.torture import paced
from tests.torture.figures import Setting


async def test_all_files_of_paced_hosts_are_found_and_no_refusal_is_charged(tmp_path: Path, seed: int) -> None:
    figures = await paced.run(Setting(seed, 0.05, tmp_path))
    (charged,) = [figure for figure in figures if "charged" in figure.name]
    assert charged.met, figures
