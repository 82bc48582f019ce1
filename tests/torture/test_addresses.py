"""The torture's addresses, all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torture import addresses
from tests.torture.figures import Setting


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own takes root")
async def test_no_address_leads_the_daemon_into_a_private_network(tmp_path: Path, seed: int) -> None:
    figures = await addresses.run(Setting(seed, 1.0, tmp_path))
    assert [figure for figure in figures if not figure.met] == []
