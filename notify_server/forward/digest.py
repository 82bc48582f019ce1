"""Composes the messages of bots: one digest for all that happened within `group_wait`, reminders, and the recovery.

Pure: events and times are passed in. Which events a digest is made of, and when, is decided by `forward.group`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from notify_server.events.texts import Language, reason_text, text
from notify_server.forward.bots.answer import Message

MAX_BATCHES = 5
MAX_FILES = 3
_NAME_LIMIT = 60
_FULL_WIDTH = str.maketrans({ch: chr(ord(ch) + 0xFEE0) for ch in "`*[]<>@~|"})


def _plain(value: object, limit: int = _NAME_LIMIT) -> str:
    """Return text from outside as it may stand in Markdown: one line, nothing that formats, links or mentions."""
    shown = "".join(ch if ch.isprintable() else " " for ch in str(value))
    if len(shown) > limit:
        shown = f"{shown[: limit // 2]}…{shown[-(limit // 2 - 1) :]}"
    # Robots differ in how a backslash escapes, so what would format becomes its full-width form.
    return shown.translate(_FULL_WIDTH)


def _clock(value: str | None) -> str:
    """Return a payload's time as a person reads it, in the machine's time zone."""
    return "" if value is None else datetime.fromisoformat(value).astimezone().strftime("%m-%d %H:%M")


def _zone(value: str | None) -> str:
    """Return the machine's time zone at a payload's time: a container runs in UTC while its readers do not."""
    if value is None:
        return ""
    offset = datetime.fromisoformat(value).astimezone().utcoffset() or timedelta()
    hours, minutes = divmod(abs(offset) // timedelta(minutes=1), 60)
    shown = f"{'-' if offset < timedelta() else '+'}{hours}" + (f":{minutes:02d}" if minutes else "")
    return f"UTC{shown if offset else ''}"


def _missing_lines(language: Language, data: Mapping[str, Any]) -> list[str]:
    lines = []
    for file in data["missing"][:MAX_FILES]:
        what = file["reason_text"][language]
        # The code or status itself stays, so that it can be searched for.
        reason = text(language, "line.code", what=what, code=file["reason"]) if file["reason"] else what
        name = _plain(file["source_path"] or file["oss_object_name"].rpartition("/")[2])
        lines.append("- " + text(language, "line.missing", name=name, reason=reason))
    if (more := data["missing_total"] - len(lines)) > 0:
        lines.append("- " + text(language, "line.more_files", count=more))
    return lines


def _ending_lines(language: Language, data: Mapping[str, Any]) -> list[str]:
    lines = []
    for file in data["ending"][:MAX_FILES]:
        name = _plain(file["source_path"] or file["oss_object_name"].rpartition("/")[2])
        lines.append("- " + text(language, f"line.ending_{file['what']}", name=name, at=_clock(file["ends_at"])))
    if (more := data["ending_total"] - len(lines)) > 0:
        lines.append("- " + text(language, "line.more_files", count=more))
    return [*lines, text(language, "line.do_fetch")]


def _advice(language: Language, kind: str, data: Mapping[str, Any]) -> str:
    if kind != "batch.incomplete" or not data["missing"]:
        return text(language, "line.do_wait")
    ((reason, state), _), *_ = Counter((each["reason"], each["state"]) for each in data["missing"]).most_common(1)
    return text(language, "line.do_recheck", next=reason_text(language, reason, state, "next"))


def _problem(kind: str, data: Mapping[str, Any]) -> str:
    """Return the name of a problem among the texts: silence of an api_code comes as batch.late."""
    return "quiet" if data.get("limit") == "quiet" else kind.rpartition(".")[2]


def _label(data: Mapping[str, Any]) -> str:
    return data.get("batch_id") or data.get("reference") or ""


def _heading(data: Mapping[str, Any]) -> str:
    """Return the names of a batch: its batch_id and reference, as far as they are known, and the api_code."""
    known = (data.get("batch_id"), data.get("reference"), data["api_code"])
    names = [_plain(name) for name in dict.fromkeys(known) if name]
    return " ".join([f"**{names[0]}**", *names[1:]])


def _batch_lines(language: Language, kind: str, data: Mapping[str, Any]) -> list[str]:
    """Return the lines of one batch: which, what is missing and why, what to do, a link."""
    values = {
        "files": data.get("files"),
        "missing": data.get("missing_total"),
        "expected": data.get("expected_files"),
        "since": _clock(data.get("limit_at")),
        "ending": data.get("ending_total"),
        "ends": _clock(data.get("ends_at")),
        "zone": _zone(data.get("limit_at") or data.get("ends_at")),
        "last": _clock(data.get("last_received_at")),
        "last_zone": _zone(data.get("last_received_at")),
    }
    name = _problem(kind, data)
    if name == "quiet" and not data["last_received_at"]:
        name = "never"
    lines = [_heading(data), text(language, f"line.{name}", **values)]
    if kind == "batch.expiring":
        lines += _ending_lines(language, data)
    elif "missing" in data and kind != "batch.complete":
        lines += _missing_lines(language, data)
        if kind == "batch.at_risk":
            times = [
                text(language, f"line.{key}", at=_clock(data[key]))
                for key in ("next_attempt_at", "final_by")
                if data.get(key)
            ]
            zone = text(language, "line.zone", zone=_zone(data.get("final_by") or data.get("next_attempt_at")))
            lines += [" · ".join(times) + zone] if times else []
        lines.append(_advice(language, kind, data))
    elif kind in ("batch.late", "batch.short"):
        lines.append(text(language, f"line.do_{kind.rpartition('.')[2]}"))
    if data.get("url"):
        lines.append(f"[{text(language, 'line.link')}]({data['url']})")
    return lines


def compose(
    language: Language,
    payloads: Sequence[Mapping[str, Any]],
    *,
    reminder: bool = False,
    dashboard: str | None = None,
) -> Message:
    """Return the digest of problems: how many batches, the first of them by batch_id, and a link."""
    batches = sorted(
        (each for each in payloads if each["type"].startswith("batch.")),
        key=lambda each: each["data"].get("batch_id") or "",
    )
    titles: list[str] = []
    blocks: list[list[str]] = []
    if batches:
        kinds = {_problem(each["type"], each["data"]) for each in batches}
        # One batch may have two problems, such as late and then incomplete.
        count = len({(each["data"]["api_code"], _label(each["data"])) for each in batches})
        title = text(language, f"title.{kinds.pop() if len(kinds) == 1 else 'mixed'}", count=count)
        titles.append(text(language, "title.reminder", title=title) if reminder else title)
        blocks += [_batch_lines(language, each["type"], each["data"]) for each in batches[:MAX_BATCHES]]
        if (more := len(batches) - MAX_BATCHES) > 0:
            line = text(language, "line.more_batches", count=more)
            blocks.append([f"{line} [{text(language, 'line.link_all')}]({dashboard})" if dashboard else line])
    for each in payloads:
        if each["type"].startswith("endpoint."):
            title, lines = _endpoint_lines(language, each["type"], each["data"])
            titles.append(title)
            blocks.append(lines if len(payloads) == 1 else [f"**{title}**", *lines])
        elif each["type"] == "test.ping":
            titles.append(text(language, "title.ping"))
            blocks.append([text(language, "line.ping")])
    return Message(titles[0], "\n\n".join("\n".join(block) for block in blocks))


def recovered(language: Language, payloads: Sequence[Mapping[str, Any]], *, dashboard: str | None = None) -> Message:
    """Return the one message that says that every open problem has ended."""
    batches = [each for each in payloads if each["type"] == "batch.complete"]
    others = [each for each in payloads if each["type"] == "endpoint.recovered"]
    ordered = sorted(batches, key=lambda each: each["data"]["batch_id"])
    blocks = [_batch_lines(language, each["type"], each["data"]) for each in ordered[:MAX_BATCHES]]
    if (more := len(ordered) - MAX_BATCHES) > 0:
        blocks.append([text(language, "line.more_batches", count=more)])
    for each in others:
        title, lines = _endpoint_lines(language, each["type"], each["data"])
        blocks.append([f"**{title}**", *lines])
    if batches or not others:
        title = text(language, "title.recovered", count=len(batches))
    else:
        title = _endpoint_lines(language, others[0]["type"], others[0]["data"])[0]
    return Message(title, "\n\n".join("\n".join(block) for block in blocks))


def _endpoint_lines(language: Language, kind: str, data: Mapping[str, Any]) -> tuple[str, list[str]]:
    name = _plain(data["endpoint"])
    if kind == "endpoint.recovered":
        return text(language, "title.endpoint_recovered", endpoint=name), [text(language, "line.back")]
    error = _plain(data["last_error"] or "", 200)
    key = "line.stopped" if data["stopped"] else "line.endpoint"
    return (
        text(language, "title.endpoint_failing", endpoint=name),
        [text(language, key, endpoint=name, failures=data["failures"], error=error)],
    )
