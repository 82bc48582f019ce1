"""The API of expectations: what was submitted, and whether its notification has come."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from notify_server.action_log import ActionKind
from notify_server.callbacks.errors import RefusedError
from notify_server.config.values import duration
from notify_server.expect.expectation import ExpectationState, NewExpectation
from notify_server.operations import Text
from notify_server.store.base import MAX_ID
from notify_server.store.reading.expectations import ExpectationFilter, ExpectationItem
from notify_server.store.reading.types import Limit, Page
from notify_server.submissions.service import ExpectationConflictError, ExpectationsDeleted, ExpectationsRegistered
from notify_server.web.api.handlers import Api
from notify_server.web.openapi import Created, Endpoint

# Lines of one request, and its bytes.
MAX_LINES = 10_000
MAX_BYTES = 16 * 1024 * 1024

Reference = Annotated[str, Meta(min_length=1, max_length=200, description="The name that you know the submission by.")]
ApiCode = Annotated[str, Meta(min_length=1, max_length=50)]
BatchId = Annotated[str, Meta(min_length=1, max_length=80)]
Key = Annotated[str, Meta(min_length=1, max_length=1024)]
Files = Annotated[int, Meta(ge=1, le=10_000_000)]
Keys = Annotated[list[Key], Meta(min_length=1, max_length=10_000)]
Within = Annotated[str, Meta(max_length=20)] | float
CursorId = Annotated[int, Meta(ge=0, le=MAX_ID)]


class Submission(Struct, frozen=True, forbid_unknown_fields=True):
    """A submission that a notification is expected for. `files` is the number of submitted files, or their keys
    (oss_object_name, or the path of the source file). Limits are durations such as "30m", or seconds.
    """

    reference: Reference
    api_code: ApiCode
    batch_id: BatchId | None = None
    files: Files | Keys | None = None
    notify_within: Within = "30m"
    verdict_within: Within = "2h"

    def expectation(self) -> NewExpectation:
        """Return the expectation. Raises RefusedError that names the wrong field."""
        keys = None if self.files is None or isinstance(self.files, int) else tuple(dict.fromkeys(self.files))
        for name in ("reference", "api_code", "batch_id"):
            if "\0" in (getattr(self, name) or ""):
                raise RefusedError(400, "400", f"{name}: must not contain NUL")
        if any("\0" in key for key in keys or ()):
            raise RefusedError(400, "400", "files: must not contain NUL")
        return NewExpectation(
            self.reference,
            self.api_code,
            self.batch_id,
            len(keys) if keys is not None else self.files if isinstance(self.files, int) else None,
            keys,
            _within("notify_within", self.notify_within),
            _within("verdict_within", self.verdict_within),
        )


class ExpectationQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the list of expectations, and a page of it."""

    state: ExpectationState | None = None
    api_code: Text | None = None
    reference: Text | None = None
    batch_id: Text | None = None
    cursor: CursorId | None = None
    limit: Limit = 50


class NamedExpectation(Struct, frozen=True, forbid_unknown_fields=True):
    """The expectations to delete: those of a reference, or the one of a reference and api_code."""

    reference: Text
    api_code: Text | None = None


def _within(name: str, value: str | float) -> int:
    try:
        milliseconds = round(duration(value) * 1000)
    except ValueError as error:
        raise RefusedError(400, "400", f"{name}: {error}") from error
    if milliseconds <= 0:
        raise RefusedError(400, "400", f"{name}: must be more than 0")
    return milliseconds


async def expectations(api: Api, query: ExpectationQuery) -> Page[ExpectationItem]:
    wanted = ExpectationFilter(query.state, query.api_code, query.reference, query.batch_id)
    return await api.submissions.expectations(wanted, query.cursor, query.limit)


async def register_expectations(
    api: Api, wanted: Submission | list[Submission]
) -> ExpectationItem | ExpectationsRegistered | Created:
    several = isinstance(wanted, list)
    submissions: list[NewExpectation] = []
    for place, each in enumerate(wanted if isinstance(wanted, list) else [wanted]):
        try:
            submissions.append(each.expectation())
        except RefusedError as error:
            raise _of_line(place, several, error) from error
    try:
        results = await api.submissions.register(submissions)
    except ExpectationConflictError as error:
        raise _of_line(error.place, several, RefusedError(409, "409", str(error))) from error
    created = sum(is_new for _, is_new in results)
    answer: ExpectationItem | ExpectationsRegistered | None = ExpectationsRegistered(created, len(results) - created)
    if not several:
        answer = await api.submissions.expectation(results[0][0])
        if answer is None:
            raise RefusedError(404, "404", "the expectation was deleted meanwhile")
    assert answer is not None
    return Created(answer) if created else answer


def _of_line(place: int, several: bool, error: RefusedError) -> RefusedError:
    return RefusedError(error.status, error.code, f"line {place + 1}: {error.message}") if several else error


async def delete_expectations(api: Api, query: NamedExpectation) -> ExpectationsDeleted:
    deleted = await api.submissions.delete_named(query.reference, query.api_code)
    await api.action_log.add(ActionKind.EXPECTATION_DELETE, deleted, reference=query.reference, api_code=query.api_code)
    return ExpectationsDeleted(deleted)


async def expectation(api: Api, id: int) -> ExpectationItem | None:
    return await api.submissions.expectation(id)


async def delete_expectation(api: Api, id: int) -> ExpectationsDeleted | None:
    found = await api.submissions.expectation(id)
    if found is None or not await api.submissions.delete(id):
        return None
    await api.action_log.add(ActionKind.EXPECTATION_DELETE, 1, reference=found.reference, api_code=found.api_code)
    return ExpectationsDeleted(1)


EXPECTATION_ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/api/v1/expectations", expectations, query=ExpectationQuery, answer=Page[ExpectationItem]),
    Endpoint(
        "POST", "/api/v1/expectations", register_expectations,
        body=Submission, answer=ExpectationItem, max_lines=MAX_LINES, lines_answer=ExpectationsRegistered,
        refusals=(("409", "The same reference and api_code are registered with other content; msg names the field."),),
    ),
    Endpoint(
        "DELETE", "/api/v1/expectations", delete_expectations, query=NamedExpectation, answer=ExpectationsDeleted
    ),
    Endpoint("GET", "/api/v1/expectations/{id}", expectation, answer=ExpectationItem),
    Endpoint("DELETE", "/api/v1/expectations/{id}", delete_expectation, answer=ExpectationsDeleted),
)  # fmt: skip
