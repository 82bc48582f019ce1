"""Address cases of our own, after the facts that the public WHATWG and libcurl corpora test: one JSON array a line in
addresses.jsonl, of the address, the verdict (accepted, blocked, invalid) and the canonical host.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from notify_server.model import Reason
from notify_server.verify.guard import Guard

CASES = [
    tuple(json.loads(line)) for line in (Path(__file__).parent / "addresses.jsonl").read_text("ascii").splitlines()
]
VERDICTS = {None: "accepted", Reason.INVALID_URL: "invalid", Reason.PRIVATE_ADDRESS: "blocked"}
GUARD = Guard()


@pytest.mark.parametrize(("url", "verdict", "host"), CASES, ids=[ascii(case[0])[1:-1] for case in CASES])
def test_address_has_its_verdict_and_canonical_host(url: str, verdict: str, host: str) -> None:
    target = GUARD.examine(url)
    assert (VERDICTS[target.refusal], target.hostname) == (verdict, host)
    if host:
        # A canonical address reads as itself.
        assert GUARD.examine(target.url) == target


def test_there_are_as_many_cases_as_the_table_of_faults_says() -> None:
    assert len({case[0] for case in CASES}) == len(CASES) >= 300
    readme = (Path(__file__).parent.parent / "faults" / "README.md").read_text("utf-8")
    stated = re.search(r"([0-9]+) address cases: ([0-9]+) accepted, ([0-9]+) blocked, ([0-9]+) invalid", readme)
    assert stated is not None
    counts = Counter(case[1] for case in CASES)
    assert list(map(int, stated.groups())) == [len(CASES), counts["accepted"], counts["blocked"], counts["invalid"]]
