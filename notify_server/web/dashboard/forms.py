"""Converts the parameters of the pages' URLs and the fields of their forms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, TypeVar
from urllib.parse import parse_qsl, urlencode

import msgspec
from aiohttp import web
from msgspec import Meta, Struct
from multidict import MultiDict

from notify_server.callbacks.errors import RefusedError
from notify_server.model import FileState, Verdict
from notify_server.operations import Id, ReasonCode, Recheck, Text
from notify_server.store.reading.types import Cursor
from notify_server.web.bodies import read_body
from notify_server.web.parameters import convert, from_query

T = TypeVar("T", bound=Struct)

Form = Mapping[str, str]

MAX_FORM_FIELDS = 50


Within = Literal["1h", "24h", "7d", "30d"]
PERIODS: dict[str, timedelta] = {
    "1h": timedelta(hours=1), "24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30),
}  # fmt: skip


class BatchPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files of a batch to show, and how. Without a state or other filter: those that are missing, if there are
    any.
    """

    state: Literal["all", "pending", "available", "unavailable", "blocked", "upload_failed"] | None = None
    view: Literal["table", "pictures"] = "table"
    reason: ReasonCode | None = None
    q: Text | None = None
    sort: Literal["key", "state", "reason", "attempts", "next", "size"] = "key"
    desc: bool = False
    page: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    cursor: Cursor | None = None


class FilesPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the files of all batches."""

    reason: ReasonCode | None = None
    host: Annotated[str, Meta(max_length=2000)] | None = None
    state: FileState | None = None
    api_code: Text | None = None
    within: Within | None = None
    cursor: Cursor | None = None


class NotificationsPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Which of a batch's notifications to show the body of."""

    show: Id | None = None


class FailuresPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the groups of failing files."""

    reason: ReasonCode | None = None
    host: Text | None = None
    state: FileState | None = None


class BatchesPage(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the batches. Times are ISO 8601, UTC when they have no offset."""

    verdict: Verdict | None = None
    api_code: Text | None = None
    within: Within | None = None
    received_from: Text | None = None
    received_before: Text | None = None
    acknowledged: bool | None = None
    cursor: Cursor | None = None


class RecheckForm(Struct, frozen=True, forbid_unknown_fields=True):
    """Which files to recheck."""

    file: Id | None = None
    batch: Id | None = None
    reason: ReasonCode | None = None
    host: Text | None = None
    state: FileState | None = None
    api_code: Text | None = None
    received_from: Text | None = None

    def recheck(self, *, dry_run: bool) -> Recheck:
        """Return it as the API takes it. Raises RefusedError."""
        wanted = Recheck(
            file=self.file, batch=self.batch, reason=self.reason, host=self.host, api_code=self.api_code,
            received_from=moment("received_from", self.received_from), dry_run=dry_run,
        )  # fmt: skip
        return wanted if self.state is None else msgspec.structs.replace(wanted, states=[self.state])

    @classmethod
    def of(cls, form: Form) -> RecheckForm:
        """Read a form, whose other fields do not matter. Raises RefusedError."""
        return convert({name: form[name] for name in cls.__struct_fields__ if form.get(name)}, cls, from_text=True)

    def fields(self) -> dict[str, str]:
        """Return it as the fields of a form."""
        return {name: str(value) for name, value in msgspec.structs.asdict(self).items() if value is not None}

    @property
    def origin(self) -> str:
        """The page that the action belongs to."""
        if self.file is not None:
            return f"/ui/files/{self.file}"
        return "/ui/failures" if self.batch is None else f"/ui/batches/{self.batch}"

    @property
    def watch(self) -> str:
        """The page that shows the files while they are checked; none for the page of one file or batch itself."""
        if self.file is not None or self.batch is not None:
            return ""
        host = {"host": self.host} if self.host is not None else {}
        return f"/ui/files?{urlencode({'state': FileState.PENDING, **host})}"


async def read_form(request: web.Request, seconds: float) -> dict[str, str]:
    """Read the fields of a form. Raises RefusedError."""
    body = await read_body(request, "application/x-www-form-urlencoded", seconds=seconds)
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=MAX_FORM_FIELDS))
    except ValueError as error:
        raise RefusedError(400, "400", f"body: more than {MAX_FORM_FIELDS} fields") from error


def page_query(request: web.Request, kind: type[T]) -> T:
    """Read the address's parameters; a form sends the fields left empty, too. Raises RefusedError."""
    return from_query(MultiDict((name, value) for name, value in request.query.items() if value), kind)


def moment(name: str, text: str | None) -> datetime | None:
    """Read a time that a person may have typed. Raises RefusedError."""
    if text is None:
        return None
    try:
        value = datetime.fromisoformat(text)
        # The conversion to UTC overflows at both ends of the calendar.
        return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise RefusedError(400, "400", f"{name}: is not a time: write 2026-11-23T03:04:18Z") from error


def since(within: str | None, now: int) -> datetime | None:
    """Return the beginning of a period that ends at `now` (Unix ms), in whole minutes, so that a page and its actions
    mean the same files.
    """
    if within is None:
        return None
    return (datetime.fromtimestamp(now / 1000, UTC) - PERIODS[within]).replace(second=0, microsecond=0)


def row_id(request: web.Request) -> int:
    """Return the id in the path."""
    return int(request.match_info["id"])


def local_target(target: str | None) -> str:
    """Return the target of a redirect if it is an address of this site, otherwise the overview's."""
    return target if target is not None and re.fullmatch(r"/(?![/\\])[!-\[\]-~]*", target) else "/"
