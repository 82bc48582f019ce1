"""The torture's addresses, all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torture import addresses
from tests.torture.figures import Setting

SEED = 1


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own takes root")
async def test_no_address_leads_the_daemon_into_a_private_network(tmp_path: Path) -> None:
    print("seed", SEED)
    figures = await addresses.run(Setting(SEED, 1.0, tmp_path))
    assert [figure for figure in figures if not figure.met] == []
