"""The traceparent header is read as the W3C recommendation has it, and nothing else is taken for one."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notify_server.contract.trace_context import TraceParent, parse_traceparent

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{PARENT}-01"


def hexes(digits: int) -> st.SearchStrategy[str]:
    return st.text("0123456789abcdef", min_size=digits, max_size=digits)


ids = st.tuples(hexes(32).filter(lambda text: text.strip("0")), hexes(16).filter(lambda text: text.strip("0")))


def test_the_recommendations_example_is_read() -> None:
    assert parse_traceparent([HEADER]) == TraceParent(HEADER, TRACE, PARENT, 1)


@given(ids, hexes(2))
def test_every_header_of_version_00_is_read_and_of_its_flags_only_sampled(ids: tuple[str, str], flags: str) -> None:
    trace_id, parent_id = ids
    header = f"00-{trace_id}-{parent_id}-{flags}"
    assert parse_traceparent([header]) == TraceParent(header, trace_id, parent_id, int(flags, 16) % 2)


@given(
    st.integers(1, 254),
    ids,
    hexes(2),
    st.none() | st.text(string.ascii_letters + string.digits + "-_=", max_size=100),
)
def test_of_a_later_version_what_all_versions_have_is_read(
    version: int, ids: tuple[str, str], flags: str, more: str | None
) -> None:
    known = f"{version:02x}-{ids[0]}-{ids[1]}-{flags}"
    header = known if more is None else f"{known}-{more}"
    read = parse_traceparent([header])
    assert read == TraceParent(known, *ids, int(flags, 16) % 2)
    # The kept part is a header of that version again.
    assert parse_traceparent([read.text]) == read


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        HEADER[:-1],
        f"{HEADER}-",
        f"{HEADER}-more",
        f"{HEADER}0",
        f"{HEADER}\n",
        f" {HEADER}",
        f"{HEADER},{HEADER}",
        f"ff-{TRACE}-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01.",
        f"01-{TRACE}-{PARENT}-01-\x1b[31m",
        f"01-{TRACE}-{PARENT}-01-{'a' * 500}",
        f"0-{TRACE}-{PARENT}-01",
        f"0g-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT.replace('a', 'A')}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE}0-{PARENT}-01",
        f"00-{TRACE}-{PARENT[1:]}-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-0x",
        f"00-{TRACE}-{PARENT}-+1",
        f"00_{TRACE}_{PARENT}_01",
        f"00-{TRACE[:-1]}\N{ARABIC-INDIC DIGIT ONE}-{PARENT}-01",
    ],
    ids=ascii,
)
def test_an_invalid_header_is_ignored(header: str) -> None:
    assert parse_traceparent([header]) is None


def test_a_header_that_is_missing_or_repeated_is_none() -> None:
    assert parse_traceparent([]) is None
    assert parse_traceparent([HEADER, HEADER]) is None


@given(st.text() | st.from_regex(re.compile(r"[0-9a-f]{2}-[0-9a-f]{30,33}-[0-9a-f]{15,17}-[0-9a-f]{1,3}(-.*)?")))
def test_whatever_is_sent_it_is_read_to_the_letter_or_not_at_all(header: str) -> None:
    read = parse_traceparent([header])
    if read is not None:
        assert header.startswith(read.text)
        assert len(read.text) == 55
        assert read.text.split("-")[1:3] == [read.trace_id, read.parent_id]
        assert int(read.trace_id, 16)
        assert int(read.parent_id, 16)
        assert not read.text.startswith("ff")
        assert read.flags in (0, 1)


@given(ids, st.integers(0, 54), st.characters(codec="ascii"))
def test_one_wrong_character_makes_it_none(ids: tuple[str, str], place: int, wrong: str) -> None:
    header = f"00-{ids[0]}-{ids[1]}-01"
    legal = "-" if header[place] == "-" else "0123456789abcdef"
    if wrong not in legal:
        assert parse_traceparent([header[:place] + wrong + header[place + 1 :]]) is None
