"""The meaning of an answer: which results are retried, when, and which are final."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from notify_server.config import HostSettings, StatusRange, VerifyConfig
from notify_server.model import Evidence, FileState, Reason, Target, http_reason
from notify_server.verify.guard import Guard
from notify_server.verify.policy import (
    AVAILABLE,
    CONNECTION_FAILURES,
    Conclusion,
    NextRequest,
    Outcome,
    conclude,
    first,
    judge,
    retry_after_ms,
)

GUARD = Guard(allowed_ports=[80, 443])
TARGET = GUARD.examine("https://files.example.com/a/b.jpg?sign=%2F")
DEFAULTS = HostSettings()
# Tuesday, 14 November 2023, 22:13:20 UTC.
NOW = 1_700_000_000_000
SCHEDULE = (5.0, 30.0, 300.0)
RETRY = Conclusion(FileState.PENDING, "http_404")
many = settings(max_examples=150, deadline=None)


def evidence(
    status: int | None = None,
    failure: Reason | None = None,
    *,
    reused: bool = False,
    location: str | None = None,
    content_length: int | None = None,
    connected: bool = False,
    retry_after: str | None = None,
) -> Evidence:
    return Evidence(
        id=1,
        status=status,
        failure=failure,
        reused=reused,
        remote_addr="192.0.2.1",
        dns_ms=None,
        connect_ms=1.0 if connected else None,
        tls_ms=None,
        first_byte_ms=None,
        total_ms=1.0,
        content_length=content_length,
        location=location,
        retry_after=retry_after,
    )


def head(*, hops: int = 0, fresh: bool = False, target: Target = TARGET, origin: Target | None = None) -> NextRequest:
    return NextRequest(target, "HEAD", hops, fresh, origin)


def get(*, hops: int = 0, fresh: bool = False, ranged: bool = True) -> NextRequest:
    return NextRequest(TARGET, "GET", hops, fresh, ranged=ranged)


# -- every status, method and connection -------------------------------------------------------------------------------

METHODS: tuple[tuple[HostSettings, NextRequest], ...] = tuple(
    (HostSettings.model_validate({"methods": methods}), ask)
    for methods, ask in (
        (("HEAD", "GET"), head()),
        (("HEAD", "GET"), get()),
        (("HEAD",), head()),
        (("GET",), get()),
        (("GET", "HEAD"), get()),
        (("GET", "HEAD"), head()),
    )
)
ACCEPTED = (
    (StatusRange(200, 299),),
    (StatusRange(200, 200),),
    (StatusRange(200, 206), StatusRange(304, 304)),
    (StatusRange(301, 302), StatusRange(403, 405)),
    (StatusRange(100, 599),),
    (StatusRange(599, 599),),
)


def follow(url: str, location: str) -> Target:
    return GUARD.follow(url, location)


@pytest.mark.parametrize("accepted", ACCEPTED, ids=str)
@pytest.mark.parametrize(("methods", "ask"), METHODS, ids=lambda value: getattr(value, "method", None))
def test_every_status_has_one_meaning(
    accepted: tuple[StatusRange, ...], methods: HostSettings, ask: NextRequest
) -> None:
    some = HostSettings(methods=methods.methods, accept_status=accepted)
    falls_back = ask.method == "HEAD" and some.methods == ("HEAD", "GET")
    for status, reused, fresh in product(range(100, 600), (True, False), (True, False)):
        asked = NextRequest(ask.target, ask.method, 1, fresh)
        found = judge(asked, evidence(status, reused=reused, location="/elsewhere"), some, follow)
        if any(low <= status <= high for low, high in accepted):
            assert found == AVAILABLE
        elif reused and not fresh:
            assert found == NextRequest(ask.target, ask.method, 1, fresh=True)
        elif status in (301, 302, 303, 307, 308):
            moved = GUARD.examine("https://files.example.com/elsewhere")
            assert found == NextRequest(moved, ask.method, 2, origin=ask.target)
        elif status in (400, 401, 403, 404, 405, 406, 422, 501) and falls_back:
            assert found == NextRequest(ask.target, "GET")
        elif status in (400, 403, 416, 501) and ask.method == "GET":
            assert found == NextRequest(ask.target, "GET", 1, ranged=False)
        elif status == 429:
            assert found == Conclusion(FileState.PENDING, "http_429", busy=True)
        else:
            assert found == Conclusion(FileState.PENDING, f"http_{status}", final=status == 410)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("reused", [True, False])
@pytest.mark.parametrize("failure", [*Reason, None])
def test_every_failure_has_one_meaning(failure: Reason | None, reused: bool, fresh: bool) -> None:
    refusals = {
        Reason.PRIVATE_ADDRESS,
        Reason.PORT_NOT_ALLOWED,
        Reason.HOST_NOT_ALLOWED,
        Reason.INVALID_URL,
        Reason.BAD_REDIRECT,
    }
    found = judge(head(fresh=fresh), evidence(failure=failure, reused=reused), DEFAULTS, follow)
    if reused and not fresh:
        assert found == head(fresh=True)
    elif failure in refusals:
        assert found == Conclusion(FileState.BLOCKED, failure)
    elif failure in (None, Reason.PROTOCOL_ERROR):
        assert found == get()
    else:
        assert found == Conclusion(FileState.PENDING, failure or Reason.PROTOCOL_ERROR)


def test_an_attempt_begins_with_the_first_method_on_any_connection() -> None:
    assert first(TARGET, DEFAULTS) == head()
    assert first(TARGET, HostSettings(methods=("GET", "HEAD"))) == get()


# -- what is retried and what is final ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 403, 408, 500, 502, 503, 504, 599, 401, 409, 416, 451, 304, 206])
def test_a_status_that_is_not_accepted_is_retried(status: int) -> None:
    found = judge(get(ranged=False), evidence(status), HostSettings(accept_status=(StatusRange(200, 200),)), follow)
    assert found == Conclusion(FileState.PENDING, http_reason(status))
    assert conclude(found, 1, SCHEDULE, 0.0, 0.5, None) == Outcome(FileState.PENDING, 5000)


def test_410_alone_among_the_statuses_is_final() -> None:
    final = []
    for status in range(100, 600):
        found = judge(get(), evidence(status), DEFAULTS, follow)
        if isinstance(found, Conclusion) and conclude(found, 1, SCHEDULE, 0.0, 0.5, None).wait_ms is None:
            final.append((status, conclude(found, 1, SCHEDULE, 0.0, 0.5, None).state))
    assert final == [(status, FileState.AVAILABLE) for status in range(200, 300)] + [(410, FileState.UNAVAILABLE)]


@pytest.mark.parametrize(
    "failure", [Reason.TIMEOUT, Reason.DNS_ERROR, Reason.CONNECT_ERROR, Reason.TLS_ERROR, Reason.PROTOCOL_ERROR]
)
def test_a_failure_to_get_an_answer_is_retried(failure: Reason) -> None:
    found = judge(get(), evidence(failure=failure), DEFAULTS, follow)
    assert isinstance(found, Conclusion)
    assert conclude(found, 1, SCHEDULE, 0.0, 0.5, None) == Outcome(FileState.PENDING, 5000)


@pytest.mark.parametrize("refusal", [Reason.PRIVATE_ADDRESS, Reason.PORT_NOT_ALLOWED, Reason.HOST_NOT_ALLOWED])
def test_what_the_guard_refused_while_dialling_is_blocked_at_once(refusal: Reason) -> None:
    found = judge(head(), evidence(failure=refusal), DEFAULTS, follow)
    assert isinstance(found, Conclusion)
    assert conclude(found, 1, SCHEDULE, 0.0, 0.5, 1000) == Outcome(FileState.BLOCKED)


def test_the_circuit_is_fed_by_failures_of_the_connection_alone() -> None:
    # A host that talks nonsense answers: its protocol errors say nothing of whether it can be reached.
    assert {Reason.TIMEOUT, Reason.DNS_ERROR, Reason.CONNECT_ERROR, Reason.TLS_ERROR} == CONNECTION_FAILURES


# -- HEAD that is refused ----------------------------------------------------------------------------------------------


def test_refused_head_falls_back_to_get_at_once_for_these_statuses_alone() -> None:
    asked_again = [
        status
        for status in range(100, 600)
        if isinstance(found := judge(head(), evidence(status), DEFAULTS, follow), NextRequest) and found.method == "GET"
    ]
    assert asked_again == [400, 401, 403, 405, 406, 422, 501]


@pytest.mark.parametrize("status", [400, 403, 405, 501])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("methods", "ask"), METHODS[2::3], ids=lambda value: getattr(value, "method", None))
def test_head_without_get_after_it_does_not_fall_back(
    status: int, methods: HostSettings, ask: NextRequest, last: bool
) -> None:
    found = judge(ask, evidence(status), methods, follow, last=last)
    assert found == Conclusion(FileState.PENDING, f"http_{status}")


@pytest.mark.parametrize("failure", [None, Reason.PROTOCOL_ERROR])
def test_connection_closed_after_head_falls_back_to_get_at_once(failure: Reason | None) -> None:
    assert judge(head(), evidence(failure=failure), DEFAULTS, follow) == get()


@pytest.mark.parametrize("status", [404, 405, 403])
def test_head_that_was_redirected_to_an_error_page_falls_back_to_get_of_the_original_address(status: int) -> None:
    elsewhere = GUARD.examine("https://cdn.example.net/error.html")
    redirected = judge(head(), evidence(302, location="https://cdn.example.net/error.html"), DEFAULTS, follow)
    assert redirected == head(hops=1, target=elsewhere, origin=TARGET)
    assert judge(redirected, evidence(status), DEFAULTS, follow) == get()


def test_last_attempt_ends_with_get_for_every_status_but_410_and_the_busy_ones() -> None:
    for status in {*range(100, 600)} - {*range(200, 300), 301, 302, 303, 307, 308, 410, 429}:
        assert judge(head(), evidence(status), DEFAULTS, follow, last=True) == get(), status
    assert judge(head(), evidence(410), DEFAULTS, follow, last=True) == Conclusion(
        FileState.PENDING, "http_410", final=True
    )


def test_last_attempt_ends_with_get_after_a_time_out_if_the_request_had_reached_the_server() -> None:
    timed_out = evidence(failure=Reason.TIMEOUT, connected=True)
    assert judge(head(), timed_out, DEFAULTS, follow, last=True) == get()
    assert judge(head(), timed_out, DEFAULTS, follow) == Conclusion(FileState.PENDING, Reason.TIMEOUT)
    for failure in (Reason.TIMEOUT, Reason.DNS_ERROR, Reason.CONNECT_ERROR, Reason.TLS_ERROR):
        found = judge(head(), evidence(failure=failure), DEFAULTS, follow, last=True)
        assert found == Conclusion(FileState.PENDING, failure)


def test_last_attempt_ends_with_get_after_too_many_redirects() -> None:
    at_limit = head(hops=DEFAULTS.max_redirects, target=GUARD.examine("https://cdn.example.net/loop"), origin=TARGET)
    assert judge(at_limit, evidence(302, location="/loop"), DEFAULTS, follow, last=True) == get()


@pytest.mark.parametrize("refusal", [Reason.PRIVATE_ADDRESS, Reason.PORT_NOT_ALLOWED, Reason.HOST_NOT_ALLOWED])
def test_last_attempt_does_not_ask_again_for_what_the_guard_refused(refusal: Reason) -> None:
    found = judge(head(), evidence(failure=refusal), DEFAULTS, follow, last=True)
    assert found == Conclusion(FileState.BLOCKED, refusal)


# -- ranges that are refused -------------------------------------------------------------------------------------------


def test_refused_range_is_followed_by_one_plain_get_for_these_statuses_alone() -> None:
    asked_again = [
        status
        for status in range(100, 600)
        if judge(get(hops=2), evidence(status), DEFAULTS, follow) == get(hops=2, ranged=False)
    ]
    assert asked_again == [400, 403, 416, 501]
    for status in asked_again:
        found = judge(get(ranged=False), evidence(status), DEFAULTS, follow, last=True)
        assert found == Conclusion(FileState.PENDING, f"http_{status}")


# -- hosts that ask for fewer requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [head(), get(), get(ranged=False)])
@pytest.mark.parametrize("last", [False, True])
def test_429_and_503_with_retry_after_are_about_the_host(ask: NextRequest, last: bool) -> None:
    for answer in (
        evidence(429),
        evidence(429, retry_after="1"),
        evidence(503, retry_after="Fri, 31 Dec 1999 23:59:59 GMT"),
    ):
        found = judge(ask, answer, DEFAULTS, follow, last=last)
        assert found == Conclusion(FileState.PENDING, f"http_{answer.status}", busy=True)


def test_503_without_retry_after_is_about_the_file() -> None:
    assert judge(head(), evidence(503), DEFAULTS, follow) == Conclusion(FileState.PENDING, "http_503")


def test_a_fallback_follows_redirects_as_get() -> None:
    found = judge(get(), evidence(307, location="/moved"), DEFAULTS, follow)
    assert found == NextRequest(GUARD.examine("https://files.example.com/moved"), "GET", 1, origin=TARGET)


# -- an empty object ---------------------------------------------------------------------------------------------------


def test_416_to_get_shows_that_an_empty_object_is_there() -> None:
    assert judge(get(), evidence(416, content_length=0), DEFAULTS, follow) == AVAILABLE


@pytest.mark.parametrize(("ask", "length"), [(get(ranged=False), None), (get(ranged=False), 1), (head(), 0)])
def test_416_is_a_bad_answer_without_a_range_or_a_known_empty_object(ask: NextRequest, length: int | None) -> None:
    found = judge(ask, evidence(416, content_length=length), DEFAULTS, follow)
    assert found == Conclusion(FileState.PENDING, "http_416")


@pytest.mark.parametrize("status", [404, 500, 403])
def test_an_empty_body_makes_no_other_status_good(status: int) -> None:
    assert judge(get(), evidence(status, content_length=0), DEFAULTS, follow) != AVAILABLE


# -- redirects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_the_same_method_and_counted(status: int) -> None:
    found = judge(head(hops=2, fresh=True), evidence(status, location="http://cdn.example.net/x"), DEFAULTS, follow)
    assert found == head(hops=3, target=GUARD.examine("http://cdn.example.net/x"), origin=TARGET)


@pytest.mark.parametrize("status", [300, 304, 305, 306])
def test_an_answer_that_is_no_redirect_is_not_followed(status: int) -> None:
    found = judge(head(), evidence(status, location="http://cdn.example.net/x"), DEFAULTS, follow)
    assert found == Conclusion(FileState.PENDING, f"http_{status}")


@pytest.mark.parametrize("limit", [0, 1, 5, 50])
def test_as_many_redirects_are_followed_as_the_limit_says(limit: int) -> None:
    some = HostSettings(max_redirects=limit)
    ask = first(TARGET, some)
    for hop in range(limit):
        found = judge(ask, evidence(302, location="/loop"), some, follow)
        assert isinstance(found, NextRequest)
        assert found.hops == hop + 1
        ask = found
    assert judge(ask, evidence(302, location="/loop"), some, follow) == Conclusion(
        FileState.PENDING, Reason.TOO_MANY_REDIRECTS
    )


@pytest.mark.parametrize(
    ("location", "reason", "led_to"),
    [
        ("http://127.0.0.1/", Reason.PRIVATE_ADDRESS, "http://127.0.0.1/"),
        ("http://0x7f.1/", Reason.PRIVATE_ADDRESS, "http://0x7f.1/"),
        ("//169.254.169.254/latest/meta-data", Reason.PRIVATE_ADDRESS, "//169.254.169.254/latest/meta-data"),
        ("http://localhost/", Reason.PRIVATE_ADDRESS, "http://localhost/"),
        ("https://files.example.com:6379/", Reason.PORT_NOT_ALLOWED, "https://files.example.com:6379/"),
        ("file:///etc/passwd", Reason.BAD_REDIRECT, "file:///etc/passwd"),
        ("gopher://files.example.com/", Reason.BAD_REDIRECT, "gopher://files.example.com/"),
        ("ftp://files.example.com/", Reason.BAD_REDIRECT, "ftp://files.example.com/"),
        ("javascript:alert(1)", Reason.BAD_REDIRECT, "javascript:alert(1)"),
        ("http://u:secret@files.example.com/", Reason.INVALID_URL, "http://files.example.com/"),
        ("http://10.0.0.1/\x1b[2J\n", Reason.BAD_REDIRECT, "http://10.0.0.1/%1B[2J%0A"),
        ("http://10.0.0.1/" + "a" * 400, Reason.PRIVATE_ADDRESS, "http://10.0.0.1/" + "a" * 284),
    ],
)
def test_a_redirect_that_the_guard_refuses_is_blocked_and_shown_harmlessly(
    location: str, reason: Reason, led_to: str
) -> None:
    found = judge(head(), evidence(302, location=location), DEFAULTS, follow)
    assert found == Conclusion(FileState.BLOCKED, reason, led_to=led_to)
    assert conclude(found, 1, SCHEDULE, 0.0, 0.5, None) == Outcome(FileState.BLOCKED)


def test_a_redirect_to_a_host_that_is_not_allowed_is_blocked() -> None:
    guard = Guard(allowed_hosts=["files.example.com"])
    found = judge(head(), evidence(301, location="https://elsewhere.example.com/"), DEFAULTS, guard.follow)
    assert found == Conclusion(FileState.BLOCKED, Reason.HOST_NOT_ALLOWED, led_to="https://elsewhere.example.com/")


def test_a_redirect_without_location_is_retried_whatever_the_hops() -> None:
    for hops in (0, DEFAULTS.max_redirects):
        found = judge(head(hops=hops), evidence(302), DEFAULTS, follow)
        assert found == Conclusion(FileState.PENDING, Reason.BAD_REDIRECT)


def test_a_redirect_may_lead_from_https_to_http() -> None:
    found = judge(head(), evidence(302, location="http://files.example.com/plain"), DEFAULTS, follow)
    assert found == head(hops=1, target=GUARD.examine("http://files.example.com/plain"), origin=TARGET)


def test_a_redirect_is_resolved_against_the_address_that_sent_it() -> None:
    second = head(hops=1, target=GUARD.examine("http://cdn.example.net/deep/x"))
    found = judge(second, evidence(302, location="y?z"), DEFAULTS, follow)
    assert isinstance(found, NextRequest)
    assert found.target.url == "http://cdn.example.net/deep/y?z"


# -- connections that carried another answer ---------------------------------------------------------------------------

BAD: tuple[Callable[[bool], Evidence], ...] = (
    lambda reused: evidence(404, reused=reused),
    lambda reused: evidence(410, reused=reused),
    lambda reused: evidence(405, reused=reused),
    lambda reused: evidence(302, reused=reused, location="http://127.0.0.1/"),
    lambda reused: evidence(failure=Reason.PROTOCOL_ERROR, reused=reused),
    lambda reused: evidence(failure=Reason.TIMEOUT, reused=reused),
)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("ask", [head(hops=2), get()])
def test_a_bad_answer_on_a_reused_connection_is_asked_again_once_on_a_fresh_one(
    ask: NextRequest, bad: Callable[[bool], Evidence]
) -> None:
    again = judge(ask, bad(True), DEFAULTS, follow)
    assert again == NextRequest(ask.target, ask.method, ask.hops, fresh=True)
    # Whatever the prober says of it: the second answer counts.
    fresh = NextRequest(ask.target, ask.method, ask.hops, fresh=True)
    assert judge(fresh, bad(True), DEFAULTS, follow) == judge(fresh, bad(False), DEFAULTS, follow)
    assert judge(fresh, bad(False), DEFAULTS, follow) != again


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_answer_on_a_fresh_connection_counts_at_once(bad: Callable[[bool], Evidence]) -> None:
    found = judge(head(), bad(False), DEFAULTS, follow)
    assert found == judge(head(fresh=True), bad(False), DEFAULTS, follow)
    assert not (isinstance(found, NextRequest) and found.fresh)


@pytest.mark.parametrize("reused", [True, False])
def test_a_good_answer_counts_on_any_connection(reused: bool) -> None:
    assert judge(head(), evidence(200, reused=reused), DEFAULTS, follow) == AVAILABLE
    assert judge(get(), evidence(416, content_length=0, reused=reused), DEFAULTS, follow) == AVAILABLE


# -- an attempt ends ---------------------------------------------------------------------------------------------------


def most_requests(some: HostSettings) -> int:
    """Every hop once for HEAD, for a ranged GET and for a plain one, each at most once more on a fresh connection."""
    return 2 * 3 * (some.max_redirects + 1)


def requests_of(some: HostSettings, answers: Iterator[Evidence]) -> tuple[int, Conclusion]:
    ask = first(TARGET, some)
    for requests, answer in enumerate(answers, 1):
        found = judge(ask, answer, some, follow)
        if isinstance(found, Conclusion):
            return requests, found
        assert requests <= most_requests(some)
        ask = found
    raise AssertionError("the answers were used up")


any_evidence = st.builds(
    evidence,
    st.sampled_from([None, 200, 301, 302, 308, 400, 403, 404, 405, 410, 416, 501, 503]) | st.integers(100, 599),
    st.sampled_from([None, *Reason]),
    reused=st.booleans(),
    location=st.sampled_from([None, "/loop", "http://cdn.example.net/", "http://127.0.0.1/", "ftp://x/", ""]),
    content_length=st.sampled_from([None, 0, 1]),
)


@many
@given(
    st.sampled_from([("HEAD", "GET"), ("HEAD",), ("GET",), ("GET", "HEAD")]),
    st.integers(0, 6),
    st.lists(any_evidence, min_size=2 * (6 + 2), max_size=2 * (6 + 2)),
)
def test_any_answers_lead_to_a_conclusion_within_a_bound(
    methods: tuple[str, ...], max_redirects: int, answers: list[Evidence]
) -> None:
    some = HostSettings.model_validate({"methods": methods, "max_redirects": max_redirects})
    requests, _ = requests_of(some, iter(answers))
    assert requests <= most_requests(some)


@pytest.mark.parametrize("max_redirects", [0, 1, 5])
def test_the_bound_is_reached_by_the_most_tiresome_origin(max_redirects: int) -> None:
    some = HostSettings(max_redirects=max_redirects)
    statuses = [302] * max_redirects + [405] + [416, 302] * max_redirects + [416, 404]
    answers = (evidence(status, reused=reused, location="/") for status in statuses for reused in (True, False))
    assert requests_of(some, answers) == (most_requests(some), RETRY)


# -- what becomes of the file ------------------------------------------------------------------------------------------


def test_a_file_is_tried_once_more_than_the_schedule_has_waits() -> None:
    fates = [conclude(RETRY, attempt, SCHEDULE, 0.0, 0.5, None) for attempt in range(1, 6)]
    assert fates == [
        Outcome(FileState.PENDING, 5_000),
        Outcome(FileState.PENDING, 30_000),
        Outcome(FileState.PENDING, 300_000),
        Outcome(FileState.UNAVAILABLE),
        Outcome(FileState.UNAVAILABLE),
    ]


def test_the_default_schedule_gives_up_after_eight_attempts() -> None:
    config = VerifyConfig()
    fates = [conclude(RETRY, n, config.retry_schedule, config.jitter, 0.5, None) for n in range(1, 9)]
    assert [fate.wait_ms and fate.wait_ms // 1000 for fate in fates] == [5, 30, 300, 1800, 7200, 18000, 36000, None]


def test_an_empty_schedule_means_one_attempt() -> None:
    assert conclude(RETRY, 1, (), 0.2, 0.5, 60_000) == Outcome(FileState.UNAVAILABLE)
    assert conclude(AVAILABLE, 1, (), 0.2, 0.5, None) == Outcome(FileState.AVAILABLE)


def test_a_final_answer_settles_the_file_while_the_schedule_lasts() -> None:
    assert conclude(Conclusion(FileState.PENDING, "http_410", final=True), 1, SCHEDULE, 0.2, 0.5, 60_000) == Outcome(
        FileState.UNAVAILABLE
    )


@pytest.mark.parametrize("attempts", [1, 3, 4, 1000])
@pytest.mark.parametrize("state", [FileState.AVAILABLE, FileState.BLOCKED])
def test_a_settled_file_stays_settled_after_any_attempt(state: FileState, attempts: int) -> None:
    assert conclude(Conclusion(state), attempts, SCHEDULE, 0.2, 0.5, 1000) == Outcome(state)


@pytest.mark.parametrize(
    ("jitter", "chance", "wait"),
    [(0.2, 0.0, 24_000), (0.2, 0.5, 30_000), (0.2, 1 - 2**-53, 36_000), (0.0, 0.0, 30_000), (0.0, 0.9, 30_000)],
)
def test_jitter_spreads_the_wait_both_ways(jitter: float, chance: float, wait: int) -> None:
    assert conclude(RETRY, 2, SCHEDULE, jitter, chance, None) == Outcome(FileState.PENDING, wait)


def test_a_greater_chance_waits_longer() -> None:
    waits = [conclude(RETRY, 3, SCHEDULE, 0.2, step / 100, None).wait_ms or 0 for step in range(100)]
    assert all(earlier < later for earlier, later in pairwise(waits))


@pytest.mark.parametrize(
    ("asked", "wait"),
    [(0, 30_000), (29_999, 30_000), (30_000, 30_000), (45_000, 45_000), (60_000, 60_000), (60_001, 60_000)],
)
@pytest.mark.parametrize("chance", [0.0, 0.99])
def test_retry_after_is_kept_between_one_and_two_scheduled_waits(asked: int, wait: int, chance: float) -> None:
    assert conclude(RETRY, 2, SCHEDULE, 0.2, chance, asked) == Outcome(FileState.PENDING, wait)


def test_retry_after_does_not_lengthen_the_schedule() -> None:
    assert conclude(RETRY, 4, SCHEDULE, 0.2, 0.5, 60_000) == Outcome(FileState.UNAVAILABLE)


@many
@given(
    st.lists(st.floats(0, 36_500 * 86_400.0), min_size=1, max_size=50),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.none() | st.integers(0, 10**18),
    st.data(),
)
def test_no_wait_is_much_shorter_or_longer_than_scheduled(
    schedule: list[float], jitter: float, chance: float, asked: int | None, data: st.DataObject
) -> None:
    attempt = data.draw(st.integers(1, len(schedule)))
    fate = conclude(RETRY, attempt, schedule, jitter, chance, asked)
    base = schedule[attempt - 1] * 1000
    assert fate.state is FileState.PENDING
    assert fate.wait_ms is not None
    # A whole number of milliseconds: off by half of one at most, and by what a double cannot tell apart.
    assert base * (1 - jitter) - 0.51 <= fate.wait_ms <= 2 * base + 0.51
    if asked is not None:
        assert fate.wait_ms >= base - 0.51


# -- Retry-After -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("0", 0),
        ("7", 7_000),
        (" 120 ", 120_000),
        ("0120", 120_000),
        ("1000000000", 1_000_000_000_000),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10_000),
        ("Tuesday, 14-Nov-23 22:13:30 GMT", 10_000),
        ("Tue Nov 14 22:13:30 2023", 10_000),
        ("Tue, 14 Nov 2023 23:13:30 +0100", 10_000),
        ("Tue, 14 Nov 2023 22:13:20 GMT", 0),
        ("Tue, 14 Nov 2023 22:13:19 GMT", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value: str, wait: int) -> None:
    assert retry_after_ms(value, NOW) == wait


@pytest.mark.parametrize(
    "value",
    [
        *(
            "",
            " ",
            "soon",
            "-1",
            "-1000000000",
            "+5",
            "1.5",
            "1e9",
            "5s",
            "5 5",
            "0x10",
            "٣",
            "²",
            "nan",
            "\x00",
            "\ufffd",
        ),
        "Tue, 99 Nov 2023 22:13:30 GMT",
        "Tue, 14 Nov 99999 22:13:30 GMT",
        "Tue, 14 Nov 2023 22:13:30 +9999999999",
    ],
)
def test_a_junk_retry_after_asks_for_nothing(value: str) -> None:
    assert retry_after_ms(value, NOW) is None


def test_an_absent_retry_after_asks_for_nothing() -> None:
    assert retry_after_ms(None, NOW) is None


@pytest.fixture
def shanghai(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CST-8")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("shanghai")
@pytest.mark.parametrize("value", ["Tue Nov 14 22:13:30 2023", "Tue, 14 Nov 2023 22:13:30 -0000"])
def test_a_date_without_a_zone_is_utc_wherever_the_daemon_runs(value: str) -> None:
    # RFC 9110 5.6.7: the asctime format carries no zone and means UTC.
    assert retry_after_ms(value, NOW) == 10_000


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("1", 30_000),
        ("40", 40_000),
        ("1000000000", 60_000),
        ("9" * 5000, 60_000),
        ("-5", 30_000),
        ("junk", 30_000),
        ("Tue, 14 Nov 2023 22:14:00 GMT", 40_000),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 30_000),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60_000),
    ],
)
def test_whatever_retry_after_says_the_wait_stays_between_one_and_two_scheduled_waits(value: str, wait: int) -> None:
    assert conclude(RETRY, 2, SCHEDULE, 0.0, 0.5, retry_after_ms(value, NOW)) == Outcome(FileState.PENDING, wait)


DATE_LIKE = (
    r"\A(Mon|Tue|Foo)?,? ?-?[0-9]{1,11}[ -](Nov|Feb|Foo|[0-9]+)[ -][0-9]{1,11} -?[0-9:.]{1,20} ?[+-]?[0-9A-Z]{0,20}\Z"
)


@many
@given(st.text() | st.from_regex(DATE_LIKE), st.integers(0, 2**45))
@example("0" * 5000, NOW)
@example("Mon, 01 Jan 0001 00:00:00 +2359", NOW)
@example("Fri, 31 Dec 9999 23:59:59 -2359", NOW)
@example("Mon, 01 Jan 0001 00:00:00", NOW)
@example("0 0 0 0 0 0", NOW)
def test_no_text_makes_retry_after_raise_or_ask_for_less_than_nothing(value: str, now: int) -> None:
    wait = retry_after_ms(value, now)
    assert wait is None or wait >= 0
