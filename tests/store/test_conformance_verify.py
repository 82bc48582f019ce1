"""From due files to recorded results."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from notify_server.model import BatchVerdict, DueFile, FileState, HostDue, Verdict
from notify_server.store.base import Engine
from tests.store.backends import Backend
from tests.store.builders import (
    API_CODE,
    HOST,
    NOW,
    again,
    blocked,
    claim,
    claim_one,
    failed,
    finished,
    found,
    missing,
    request,
    take_in,
)


async def wait_at(store: Engine, due: dict[str, int], *, host: str = HOST) -> None:
    """Take in files which are due at these times."""
    start = min(due.values())
    await take_in(store, *(finished(name, host=host) for name in due), batch_id=host, now=start)
    names = {f"https://{host}/{name}": at for name, at in due.items()}
    files = await claim(store, host, now=start)
    await store.record([again(file, names[file.target_url], requests=()) for file in files], start)


async def claim_by_one(store: Engine, host: str = HOST, *, now: int) -> list[DueFile]:
    """All that is due, each with a claim of its own."""
    claimed: list[DueFile] = []
    while files := await claim(store, host, now=now, n=1):
        claimed += files
    return claimed


def names_of(files: list[DueFile]) -> list[str]:
    return [file.target_url.rpartition("/")[2] for file in files]


# due_hosts


async def test_no_host_is_due_in_an_empty_store(store: Engine) -> None:
    assert await store.due_hosts("", 10) == []


async def test_hosts_with_pending_files_come_in_the_order_of_their_names_each_with_its_first_due_time(
    store: Engine,
) -> None:
    await wait_at(store, {"1": NOW + 30, "2": NOW + 20, "3": NOW + 40}, host="b.example")
    await wait_at(store, {"1": NOW + 10}, host="a.example:8443")
    await wait_at(store, {"1": NOW + 50}, host="a.example")
    await wait_at(store, {"1": NOW + 60}, host="a-b.example")
    assert await store.due_hosts("", 10) == [
        HostDue("a-b.example", NOW + 60),
        HostDue("a.example", NOW + 50),
        HostDue("a.example:8443", NOW + 10),
        HostDue("b.example", NOW + 20),
    ]


async def test_hosts_are_paged_from_behind_the_one_given_whether_it_exists_or_not(store: Engine) -> None:
    hosts = [f"h{n}.example" for n in range(7)]
    await take_in(store, *(finished(f"{n} {host}", host=host) for host in hosts for n in range(3)))
    assert [due.host for due in await store.due_hosts("", 3)] == hosts[:3]
    assert [due.host for due in await store.due_hosts("h2.example", 3)] == hosts[3:6]
    assert [due.host for due in await store.due_hosts("h2.examplf", 9)] == hosts[3:]
    assert [due.host for due in await store.due_hosts("h5.example", 1)] == hosts[6:]
    assert await store.due_hosts("h6.example", 3) == []
    assert [due.host for due in await store.due_hosts("", 7)] == hosts


async def test_hosts_whose_files_have_settled_are_not_due_and_those_with_claimed_ones_are(store: Engine) -> None:
    await take_in(store, finished("a", host="a"), finished("b", host="b"), blocked("c"), failed("d"))
    await claim(store, "b")
    await store.record([found(await claim_one(store, "a"))], NOW)
    assert await store.due_hosts("", 10) == [HostDue("b", NOW)]


# claim


async def test_a_claimed_file_says_what_its_prober_needs_to_know(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a/b?c=\"d'é\\", host="h.example:8443", expires_at=NOW + 9))
    ((id, batch),) = await backend.rows("SELECT id, batch FROM file")
    address = "https://h.example:8443/a/b?c=\"d'é\\"
    assert await claim(store, "h.example:8443") == [
        DueFile(id, batch, "h.example:8443", address, 0, "a/b?c=\"d'é\\", NOW + 9)
    ]


async def test_only_due_files_are_claimed(store: Engine) -> None:
    await wait_at(store, {"1": NOW + 1, "2": NOW + 2, "3": NOW + 3})
    assert names_of(await claim(store, now=NOW)) == []
    assert names_of(await claim(store, now=NOW + 1)) == ["1"]
    assert names_of(await claim(store, now=NOW + 9)) == ["2", "3"]


async def test_what_has_been_due_longest_is_claimed_first_and_at_most_as_many_as_wanted(store: Engine) -> None:
    await wait_at(store, {"a": NOW + 3, "b": NOW + 1, "c": NOW + 5, "d": NOW + 2, "e": NOW + 4})
    assert names_of(await claim(store, now=NOW + 9, n=2)) == ["b", "d"]
    assert names_of(await claim(store, now=NOW + 9, n=2)) == ["a", "e"]
    assert names_of(await claim(store, now=NOW + 9, n=2)) == ["c"]


async def test_a_long_queue_is_claimed_in_order_little_by_little(store: Engine) -> None:
    due = {str(n): NOW + n // 3 for n in range(900)}
    await wait_at(store, due)
    claimed: list[DueFile] = []
    while files := await claim(store, now=NOW + 1000, n=100):
        claimed += files
    assert [due[name] for name in names_of(claimed)] == sorted(due.values())


async def test_what_has_become_due_since_others_were_claimed_is_claimed_with_what_was_left(store: Engine) -> None:
    await take_in(store, *(finished(name) for name in "abc"), batch_id="first")
    claimed = await claim(store, n=1)
    await take_in(store, *(finished(name) for name in "def"), batch_id="second", now=NOW + 1)
    claimed += await claim(store, now=NOW + 1, n=5)
    assert sorted(names_of(claimed)) == list("abcdef")


async def test_each_host_gives_at_most_its_own_number_and_no_other_host_gives_any(store: Engine) -> None:
    await take_in(store, *(finished(f"{host}{n}", host=host) for host in "abc" for n in range(5)))
    files = await store.claim([("c", 2), ("a", 9), ("nowhere", 3), ("b", 0)], NOW)
    assert [file.host for file in files].count("a") == 5
    assert [file.host for file in files].count("c") == 2
    assert len(files) == 7
    files += await store.claim([("b", 1), ("b", 1)], NOW)
    assert len({file.id for file in files}) == 9


async def test_blocked_failed_and_settled_files_are_never_claimed(store: Engine) -> None:
    await take_in(store, finished("a"), finished("b"), blocked("c"), failed("d"))
    first, second = await claim(store)
    await store.record([found(first), missing(second)], NOW)
    assert await store.claim([(HOST, 9), ("127.0.0.1", 9), ("", 9)], NOW + 1_000_000) == []


async def test_no_file_is_claimed_twice_while_it_is_held_however_many_ask_at_once(store: Engine) -> None:
    await take_in(store, *(finished(str(n)) for n in range(100)))
    answers = await asyncio.gather(*(claim(store, n=7) for _ in range(20)))
    assert [len(answer) for answer in answers] == [7] * 14 + [2] + [0] * 5
    assert len({file.id for answer in answers for file in answer}) == 100


async def test_a_held_file_does_not_keep_those_behind_it_from_being_claimed(store: Engine) -> None:
    await wait_at(store, {str(n): NOW + n for n in range(9)})
    for n in range(9):
        assert names_of(await claim(store, now=NOW + 9, n=1)) == [str(n)]


async def test_what_has_changed_since_others_were_claimed_is_claimed_as_it_is_now(store: Engine) -> None:
    await take_in(store, *(finished(name) for name in "abcde"))
    (first,) = await claim(store, n=1)
    others = sorted(set("abcde") - set(names_of([first])))
    moved, gone, changed, *_ = others
    await take_in(store, finished(moved, url=f"https://b.example/{moved}", host="b.example"), now=NOW + 1)
    await take_in(store, blocked(gone), now=NOW + 2)
    await take_in(store, finished(changed, url=f"https://{HOST}/new-{changed}"), now=NOW + 3)
    assert sorted(names_of(await claim_by_one(store, now=NOW + 9))) == sorted([*others[3:], f"new-{changed}"])
    assert names_of(await claim(store, "b.example", now=NOW + 9)) == [moved]


async def test_a_recheck_of_the_next_due_file_is_claimed_once(store: Engine) -> None:
    await take_in(store, finished("a"), finished("b"), finished("c"))
    (first,) = await claim(store, n=1)
    everything = [1, 2, 3]
    assert (await store.recheck([id for id in everything if id != first.id], NOW + 1)).files == 2
    files = await claim_by_one(store, now=NOW + 1)
    assert sorted([first.id, *(file.id for file in files)]) == everything


async def test_a_released_claim_comes_before_files_due_later(store: Engine) -> None:
    await wait_at(store, {str(n): NOW + n for n in range(5)})
    files = await claim(store, now=NOW + 9, n=2)
    assert names_of(await claim(store, now=NOW + 9, n=1)) == ["2"]
    store.release(files)
    assert names_of(await claim_by_one(store, now=NOW + 9)) == ["0", "1", "3", "4"]


async def test_a_released_file_can_be_claimed_again_and_has_spent_no_attempt(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"), finished("b"))
    before = await backend.rows("SELECT * FROM file_result")
    files = await claim(store)
    store.release(files[:1])
    assert await claim(store) == files[:1]
    store.release(files)
    assert sorted(file.id for file in await claim(store)) == sorted(file.id for file in files)
    assert await backend.rows("SELECT * FROM file_result") == before


async def test_releasing_a_file_that_is_not_held_does_no_harm(store: Engine) -> None:
    await take_in(store, finished())
    file = await claim_one(store)
    store.release([file])
    store.release([file, file])
    assert await claim(store) == [file]
    assert await claim(store) == []


async def test_every_claim_is_free_after_reopening(store: Engine, backend: Backend) -> None:
    await take_in(store, *(finished(str(n)) for n in range(5)))
    files = await claim(store)
    assert sorted(file.id for file in await claim(await backend.reopen())) == sorted(file.id for file in files)


# record


async def test_every_column_of_an_outcome_is_recorded(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    file = await claim_one(store)
    values: dict[str, Any] = {
        "state": "unavailable",
        "reason": "http_410",
        "attempts": 4,
        "next_attempt_at": None,
        "http_status": 410,
        "content_length": 2**53 + 1,
        "content_type": "text/plain; charset=utf-8",
        "etag": 'W/"é"',
        "last_modified": "Wed, 21 Oct 2015 07:28:00 GMT",
        "final_url": "https://cdn.example/final",
        "remote_addr": "2001:db8::1",
        "elapsed_ms": 0.125,
        "verified_at": NOW + 77,
        "vendor_request_id": "5F7C0A1B",
        "vendor_code": "InvalidObjectState",
        "headers": '{"server":"AliyunOSS"}',
        "flags": '["signed"]',
    }
    await store.record([found(file, **values | {"state": FileState.UNAVAILABLE})], NOW + 99)
    assert await backend.rows(f"SELECT {', '.join(values)} FROM file") == [tuple(values.values())]
    assert await backend.rows("SELECT oss_object_name, target_url, host, reported_status FROM file") == [
        ("key", f"https://{HOST}/key", HOST, "FINISHED")
    ]


async def test_every_column_of_an_attempt_is_recorded(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    values: dict[str, Any] = {
        "started_at": NOW + 1,
        "method": "GET",
        "url": "https://cdn.example/hop",
        "http_status": 302,
        "reason": "bad_redirect",
        "dns_ms": 0.5,
        "connect_ms": 1.25,
        "tls_ms": 2.5,
        "first_byte_ms": 3.75,
        "total_ms": 4.0,
        "remote_addr": "192.0.2.1",
        "vendor_request_id": "5F7C0A1B",
        "vendor_code": "InvalidObjectState",
    }
    file = await claim_one(store)
    nothing = dict.fromkeys(values) | {"started_at": NOW, "method": "HEAD", "total_ms": 9.0}
    await store.record([found(file, requests=(request(**nothing), request(**values)))], NOW)
    assert await backend.rows(f"SELECT {', '.join(values)} FROM attempt ORDER BY id") == [
        tuple(nothing.values()),
        tuple(values.values()),
    ]
    assert await backend.rows("SELECT DISTINCT file FROM attempt") == [(file.id,)]


async def test_each_outcome_is_recorded_for_its_own_file_however_many_there_are(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, *(finished(str(n)) for n in range(700)), batch_id="large")
    for n in range(5):
        await take_in(store, finished("0"), batch_id=f"small {n}")
    files = await claim(store)
    results = [found(file, content_length=file.id, requests=(request(total_ms=file.id),) * 2) for file in files]
    verdicts = await store.record(results, NOW)
    assert sorted(verdict.batch_id for verdict in verdicts) == ["large", *(f"small {n}" for n in range(5))]
    assert await backend.rows("SELECT count(*) FROM file WHERE content_length = id AND attempts = 1") == [(705,)]
    assert await backend.rows("SELECT count(*) FROM attempt WHERE total_ms = file") == [(1410,)]


async def test_a_file_to_be_tried_again_is_pending_and_due_at_its_next_attempt(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    file = await claim_one(store)
    assert await store.record([again(file, NOW + 5000, reason="timeout")], NOW) == []
    assert await backend.rows("SELECT state, reason, attempts, next_attempt_at, verified_at FROM file") == [
        ("pending", "timeout", 1, NOW + 5000, None)
    ]
    assert await store.due_hosts("", 9) == [HostDue(HOST, NOW + 5000)]
    assert await claim(store, now=NOW + 4999) == []
    assert (await claim_one(store, now=NOW + 5000)).attempts == 1
    assert store.backlog == 1


async def test_the_verdict_comes_exactly_with_the_last_file(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"), finished("b"), finished("c"), received_at=NOW, request_id="r")
    files = await claim(store)
    assert await store.record([found(files[0])], NOW + 1) == []
    assert await store.record([again(files[1], NOW + 3), found(files[2])], NOW + 2) == []
    assert await backend.rows("SELECT verdict, completed_at FROM batch") == [("pending", None)]
    verdicts = await store.record([found(await claim_one(store, now=NOW + 3))], NOW + 4)
    batch = files[0].batch
    assert verdicts == [
        BatchVerdict(batch, "batch", API_CODE, Verdict.COMPLETE, 3, 3, NOW, NOW + 4, "r", event=1, revision=1)
    ]
    assert await backend.rows("SELECT id, verdict, completed_at FROM batch") == [(batch, "complete", NOW + 4)]


@pytest.mark.parametrize("state", [FileState.UNAVAILABLE, FileState.BLOCKED])
async def test_a_batch_of_which_one_file_is_not_available_is_incomplete(
    store: Engine, backend: Backend, state: FileState
) -> None:
    await take_in(store, finished("a"), finished("b"), finished("c"))
    first, *others = await claim(store)
    (verdict,) = await store.record([found(first, state=state), *map(found, others)], NOW)
    assert (verdict.verdict, verdict.files, verdict.available) == (Verdict.INCOMPLETE, 3, 2)
    assert await backend.rows(f"SELECT verdict, pending, available, {state} FROM batch_summary") == [
        ("incomplete", 0, 2, 1)
    ]


async def test_recording_ends_the_claim(store: Engine) -> None:
    await take_in(store, finished("a"), finished("b"))
    first, second = await claim(store)
    await store.record([again(first, NOW + 1), again(second, NOW + 1)], NOW)
    assert len(await claim(store, now=NOW + 1)) == 2


async def test_of_several_results_of_a_file_the_first_counts_and_none_once_the_claim_has_ended(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, finished("a"), finished("b"))
    a, b = await claim(store, n=2)
    first, second = found(a), missing(a)
    assert await store.record([first, second], NOW + 1) == []
    assert await store.record([second], NOW + 2) == []
    assert await backend.rows("SELECT pending, available, unavailable FROM batch_summary") == [(1, 1, 0)]
    assert await backend.rows("SELECT count(*) FROM attempt") == [(1,)]
    (verdict,) = await store.record([found(b)], NOW + 3)
    assert verdict.verdict is Verdict.COMPLETE


async def test_recording_nothing_brings_about_nothing(store: Engine) -> None:
    await take_in(store, finished())
    assert await store.record([], NOW) == []
    assert store.backlog == 1


async def attempts_kept(backend: Backend) -> list[float]:
    return [total_ms for (total_ms,) in await backend.rows("SELECT total_ms FROM attempt ORDER BY id")]


@pytest.mark.parametrize("pattern", [[1], [12], [49, 1], [60], [12, 12, 12, 12, 1, 1, 1, 1]])
async def test_of_the_requests_made_for_a_file_the_latest_fifty_are_kept(
    store: Engine, backend: Backend, pattern: list[int]
) -> None:
    await take_in(store, finished("bystander"), batch_id="other", now=NOW)
    await store.record([found(await claim_one(store), requests=(request(total_ms=-1),))], NOW)
    await take_in(store, finished())
    made: list[float] = []
    for attempt in range(60 if pattern == [1] else 16):
        now = NOW + attempt
        fresh = [len(made) + n for n in range(pattern[attempt % len(pattern)])]
        made += fresh
        requests = tuple(request(total_ms=n) for n in fresh)
        await store.record([again(await claim_one(store, now=now), now + 1, requests=requests)], now)
        assert await attempts_kept(backend) == [-1, *made[-50:]]


async def test_the_latest_fifty_requests_are_kept_of_a_file_that_keeps_starting_over(
    store: Engine, backend: Backend
) -> None:
    for n in range(60):
        await take_in(store, finished(url=f"https://{HOST}/{n}"))
        await store.record([found(await claim_one(store), requests=(request(total_ms=n),))], NOW)
    assert await attempts_kept(backend) == [float(n) for n in range(10, 60)]


async def test_the_backlog_goes_down_with_every_file_that_settles(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"), finished("b"), finished("c"), failed("d"))
    files = await claim(store)
    expected = [3, 2, 1, 0]
    assert store.backlog == expected[0]
    for file, left in zip(files, expected[1:], strict=True):
        await store.record([missing(file)], NOW)
        assert store.backlog == left
    assert (await backend.reopen()).backlog == 0
