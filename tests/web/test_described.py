"""The running daemon against its own description: whatever is sent, the answer is one that is described."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import AcceptedNegativeData, Failure, FailureGroup
from schemathesis.core.result import Ok

from tests.support.daemon import Daemon
from tests.support.notification import batch_body
from tests.support.waiting import SECONDS

TOKEN = "correct-horse-battery"
EXAMPLES = 15
# Ends only with its listener.
STREAM = "/api/v1/stream"
MAX_LINE = 8000

load_all_checks()
WANTED: list[Any] = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "allow_header_conformance",
        "ignored_auth",
    ]
)


def _sent(case: Case[Any], url: str) -> dict[str, Any]:
    return {"method": case.method, "url": url + case.formatted_path, "params": case.query}


def _lost_its_fault(case: Case[Any], address: str, failures: Sequence[Failure]) -> bool:
    """Return whether all that was wrong is an undeclared parameter without a value, which is not in the address."""
    declared = {parameter.name for parameter in case.operation.query}
    return set(parse_qs(urlsplit(address).query, keep_blank_values=True)) <= declared and all(
        isinstance(failure, AcceptedNegativeData) and "query: violates `additionalProperties`" in failure.message
        for failure in failures
    )


def check(url: str, token: str) -> int:
    """Send what fits the description, and what does not; how many requests that was. Raises what a check finds."""
    asked = 0
    headers = {"Authorization": f"Bearer {token}"}
    with requests.Session() as session:
        session.headers.update(headers)
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
        for found in schema.exclude(path=STREAM).get_all_operations():
            assert isinstance(found, Ok)
            operation = found.ok()
            for mode in GenerationMode:
                # Where there is nothing to send there is nothing to send wrongly.
                if mode is GenerationMode.NEGATIVE and not (operation.query or operation.body):
                    continue

                @settings(
                    max_examples=EXAMPLES,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(mode))
                def send(case: Case[Any]) -> None:
                    nonlocal asked
                    address = str(session.prepare_request(requests.Request(**_sent(case, url))).url)
                    # Longer lines are refused before they are a request.
                    assume(len(address) < MAX_LINE)
                    asked += 1
                    try:
                        case.call_and_validate(session=session, headers=headers, checks=WANTED, timeout=SECONDS)
                    except FailureGroup as group:
                        if not _lost_its_fault(case, address, group.exceptions):
                            raise

                send()
    return asked


async def test_every_answer_is_one_that_is_described(tmp_path: Path) -> None:
    config: dict[str, dict[str, Any]] = {
        "verify": {"allowed_hosts": ["nowhere.invalid"]},
        "auth": {"admin_token": TOKEN},
    }
    async with Daemon(tmp_path, config) as daemon:
        await daemon.settle("batch", ["http://elsewhere.invalid/1", "http://elsewhere.invalid/2"])
        assert (await daemon.post(batch_body("", []))).status == 400
        asked = await asyncio.to_thread(check, daemon.callback.removesuffix("/notify"), TOKEN)
        assert asked > 200
        assert not [line for line in daemon.lines if line["level"] in ("error", "critical")]
