"""The JSON parsing cases against the parser of notifications."""

from __future__ import annotations

from pathlib import Path

import pytest

from notify_server.contract.wire import parse_notification
from notify_server.errors import ContractError
from tests.support.json_cases import Case, json_cases

CASES = list(json_cases())


def test_counts_in_the_table_of_faults_are_those_of_the_cases() -> None:
    accepted = sum(case.accepted for case in CASES)
    assert len({case.body for case in CASES}) == len(CASES) >= 300
    counts = f"{len(CASES)} JSON parsing cases: {accepted} accepted, {len(CASES) - accepted} refused"
    assert counts in (Path(__file__).parents[1] / "faults" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_body_is_accepted_if_and_only_if_it_is_json(case: Case) -> None:
    if case.accepted:
        assert parse_notification(case.body, max_files=10).file_list == []
    else:
        with pytest.raises(ContractError):
            parse_notification(case.body, max_files=10)
