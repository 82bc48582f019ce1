"""Notifications as the platform sends them, with as little in them as a test needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

API_CODE = "rent.dcentralize.room.add"
numbers = iter(range(1, 1_000_000))


def finished(url: str, name: str | None = None) -> dict[str, Any]:
    """An entry of `file_list` that says FINISHED; the object's key is the address unless it is given."""
    return {"oss_object_name": name or url, "target_url": url, "status": "FINISHED"}


def failed(name: str, url: str | None = None) -> dict[str, Any]:
    """An entry of `file_list` that says FAILED."""
    return {"oss_object_name": name, "target_url": url, "status": "FAILED"}


def batch_body(batch_id: str, entries: Iterable[dict[str, Any] | str]) -> bytes:
    """The body of a callback; an address alone is a FINISHED file of that name."""
    files = [finished(entry) if isinstance(entry, str) else entry for entry in entries]
    return json.dumps({"batch_id": batch_id, "api_code": API_CODE, "file_list": files}).encode()


def entry(**changes: Any) -> dict[str, Any]:
    """An entry of a file_list, whose host the guard refuses; a field set to ... is left out."""
    number = next(numbers)
    fields = {"oss_object_name": f"key/{number}", "target_url": f"http://nowhere.invalid/{number}"}
    return _changed({**fields, "status": "FINISHED"}, changes)


def notification(*entries: Any, **changes: Any) -> dict[str, Any]:
    """A notification of a batch of its own, with one file by default; a field set to ... is left out."""
    fields = {"batch_id": f"batch-{next(numbers)}", "api_code": "code", "file_list": list(entries) or [entry()]}
    return _changed(fields, changes)


def _changed(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**fields, **changes}.items() if value is not ...}
