"""How deliveries become batches and files, in whatever order and however often they come."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest

from notify_server.model import InboxItem, Verdict
from notify_server.store.base import Engine, Expansion, NewFile
from tests.store.backends import FILES, NO_EVIDENCE, Backend, Row, states, summary
from tests.store.builders import (
    HOST,
    NOW,
    again,
    blocked,
    chunk,
    claim,
    claim_one,
    deliver,
    failed,
    finished,
    found,
    missing,
    settle,
    take_in,
)

# New files


async def test_new_files_are_added_as_the_notification_and_the_guard_leave_them(
    store: Engine, backend: Backend
) -> None:
    await take_in(
        store, finished("a"), blocked("b"), failed("c"), failed("d", url="https://h/d"), now=NOW + 5, received_at=NOW
    )
    assert await backend.rows(FILES) == [
        ("a", f"https://{HOST}/a", HOST, "FINISHED", "pending", None, 0, NOW + 5, *NO_EVIDENCE, None),
        ("b", "https://127.0.0.1/key", "127.0.0.1", "FINISHED", "blocked", "private_address", 0, None,
         *NO_EVIDENCE, NOW + 5),
        ("c", None, "", "FAILED", "upload_failed", None, 0, None, *NO_EVIDENCE, NOW + 5),
        ("d", "https://h/d", "", "FAILED", "upload_failed", None, 0, None, *NO_EVIDENCE, NOW + 5),
    ]  # fmt: skip
    assert await summary(backend) == [("batch", "pending", 4, 1, 0, 0, 1, 2)]


async def test_a_batch_remembers_its_first_and_last_delivery_and_counts_them(store: Engine, backend: Backend) -> None:
    for at in (NOW + 20, NOW + 10, NOW + 40, NOW + 30):
        await take_in(store, finished(), received_at=at)
    assert await backend.rows("SELECT first_received_at, last_received_at, deliveries FROM batch") == [
        (NOW + 10, NOW + 40, 4)
    ]


async def test_a_file_of_ten_thousand_names_itself_among_all_the_others(store: Engine, backend: Backend) -> None:
    files = [finished(f"目录/{n}'\"\\\u2028;--") for n in range(10_000)]
    item = await deliver(store, 10_000)
    for start in range(0, 10_000, 2500):
        await store.expand([chunk(item, *files[start : start + 2500], last=start == 7500)], NOW)
    assert {name for (name,) in await backend.rows("SELECT oss_object_name FROM file")} == {
        file.oss_object_name for file in files
    }
    await take_in(store, *files[5000:5500])
    assert await summary(backend) == [("batch", "pending", 10_000, 10_000, 0, 0, 0, 0)]


async def test_names_and_addresses_that_differ_in_case_or_trailing_space_are_different(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, finished("key"), finished("KEY"), finished("key "), batch_id="b")
    await take_in(store, finished("key"), batch_id="B")
    assert len(await states(backend)) == 4
    assert [batch_id for batch_id, *_ in await backend.rows("SELECT batch_id FROM batch ORDER BY id")] == ["b", "B"]


# The same again


async def test_the_identical_delivery_is_a_no_op_with_no_second_verdict(store: Engine, backend: Backend) -> None:
    files = [finished("a"), blocked("b"), failed("c")]
    await take_in(store, *files)
    (first,) = await settle(store)
    before = await backend.rows(FILES), await backend.rows("SELECT * FROM batch_summary")
    assert await take_in(store, *files, now=NOW + 1000, received_at=NOW + 900) == []
    assert (await backend.rows(FILES), await backend.rows("SELECT * FROM batch_summary")) == before
    assert first.verdict is Verdict.INCOMPLETE
    assert await claim(store, now=NOW + 2000) == []


async def test_the_identical_delivery_leaves_a_file_that_waits_for_its_next_attempt_waiting(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, finished())
    await store.record([again(await claim_one(store), NOW + 5000)], NOW)
    before = await backend.rows(FILES)
    await take_in(store, finished(), now=NOW + 1000)
    assert await backend.rows(FILES) == before
    assert await claim(store, now=NOW + 4999) == []


async def test_repeating_every_expansion_of_a_delivery_changes_nothing(store: Engine, backend: Backend) -> None:
    item = await deliver(store, 3)
    chunks = [chunk(item, finished("a"), failed("b"), last=False), chunk(item, finished("c"))]
    tables = [FILES, "SELECT * FROM batch", "SELECT * FROM notification"]
    for expansion in chunks:
        await store.expand([expansion], NOW)
    before = [await backend.rows(table) for table in tables]
    for expansion in chunks:
        assert await store.expand([expansion], NOW) == []
    assert [await backend.rows(table) for table in tables] == before
    assert store.backlog == 2


async def test_an_item_cut_off_half_way_and_resumed_after_reopening_gives_the_same_rows_as_at_once(
    store: Engine, backend: Backend
) -> None:
    files = [finished("a"), failed("b"), blocked("c"), finished("d"), failed("e")]

    def chunks(item: InboxItem, batch_id: str) -> list[Expansion]:
        return [
            chunk(item, *files[:2], batch_id=batch_id, last=False),
            chunk(item, *files[2:4], batch_id=batch_id, last=False),
            chunk(item, *files[4:], batch_id=batch_id),
        ]

    whole = await deliver(store, 5, batch_id="at once")
    await store.expand(chunks(whole, "at once"), NOW)
    for cut in (1, 2):
        name = f"cut after {cut}"
        item = await deliver(store, 5, batch_id=name)
        for expansion in chunks(item, name)[:cut]:
            await store.expand([expansion], NOW)
        store = await backend.reopen()
        (item,) = await store.inbox(10)
        for expansion in chunks(item, name):
            await store.expand([expansion], NOW)

    compared = "oss_object_name, target_url, host, reported_status, state, reason, attempts, next_attempt_at"
    by_batch: dict[str, list[Row]] = {}
    for batch_id, *row in await backend.rows(
        f"SELECT batch_id, deliveries, verdict, {compared} FROM file JOIN batch ON batch.id = file.batch"
        " ORDER BY batch_id, oss_object_name"
    ):
        by_batch.setdefault(batch_id, []).append(tuple(row))
    assert len(by_batch) == 3
    assert by_batch["at once"] == by_batch["cut after 1"] == by_batch["cut after 2"]
    assert [row[0] for row in by_batch["at once"]] == [1] * 5


# What has changed


async def test_new_files_of_a_later_delivery_are_added_and_the_others_left_as_they_are(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, finished("a"))
    await settle(store)
    known = await backend.rows(FILES)
    await take_in(store, finished("a"), finished("b"), now=NOW + 1000)
    rows = await backend.rows(FILES)
    assert rows[:1] == known
    assert rows[1][:8] == ("b", f"https://{HOST}/b", HOST, "FINISHED", "pending", None, 0, NOW + 1000)


async def test_files_that_a_later_delivery_does_not_list_stay(store: Engine, backend: Backend) -> None:
    await take_in(store, finished("a"), finished("b"))
    await take_in(store, finished("b"))
    assert [name for name, *_ in await states(backend)] == ["a", "b"]


@pytest.mark.parametrize("outcome", [found, missing])
async def test_a_file_whose_address_has_changed_starts_over_without_evidence(
    store: Engine, backend: Backend, outcome: type
) -> None:
    await take_in(store, finished())
    file = await claim_one(store)
    await store.record([outcome(file, final_url="https://h/final", reason="http_410", attempts=3)], NOW)
    await take_in(store, finished(url="https://new.example/key", host="new.example"), now=NOW + 1000)
    assert await backend.rows(FILES) == [
        ("key", "https://new.example/key", "new.example", "FINISHED", "pending", None, 0, NOW + 1000,
         *NO_EVIDENCE, None)
    ]  # fmt: skip
    again_due = await claim_one(store, "new.example", now=NOW + 1000)
    assert (again_due.target_url, again_due.attempts) == ("https://new.example/key", 0)


async def test_a_waiting_file_whose_address_has_changed_is_due_at_once(store: Engine) -> None:
    await take_in(store, finished())
    await store.record([again(await claim_one(store), NOW + 3_600_000, attempts=5)], NOW)
    await take_in(store, finished(url="https://files.example.com/other", expires_at=NOW + 9), now=NOW + 1000)
    file = await claim_one(store, now=NOW + 1000)
    assert (file.target_url, file.attempts, file.expires_at) == ("https://files.example.com/other", 0, NOW + 9)


async def test_a_file_whose_new_address_the_guard_refuses_is_blocked(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    await settle(store)
    (verdict,) = await take_in(store, blocked(), now=NOW + 1000)
    assert verdict.verdict is Verdict.INCOMPLETE
    assert await backend.rows(FILES) == [
        ("key", "https://127.0.0.1/key", "127.0.0.1", "FINISHED", "blocked", "private_address", 0, None,
         *NO_EVIDENCE, NOW + 1000)
    ]  # fmt: skip
    assert await claim(store, now=NOW + 2000) == []


async def test_a_failed_file_that_is_finished_now_starts_over(store: Engine, backend: Backend) -> None:
    await take_in(store, failed(url=f"https://{HOST}/key"))
    await take_in(store, finished(), now=NOW + 1000)
    assert await backend.rows(FILES) == [
        ("key", f"https://{HOST}/key", HOST, "FINISHED", "pending", None, 0, NOW + 1000, *NO_EVIDENCE, None)
    ]
    assert len(await claim(store, now=NOW + 1000)) == 1


@pytest.mark.parametrize("same_transaction", [True, False])
@pytest.mark.parametrize("order", list(permutations(range(3))))
async def test_finished_outweighs_failed_in_whichever_order_they_come(
    store: Engine, backend: Backend, order: Sequence[int], same_transaction: bool
) -> None:
    reports = [finished(), failed(), failed(url="https://elsewhere.example/key")]
    items = [await deliver(store) for _ in order]
    expansions = [chunk(item, reports[which]) for item, which in zip(items, order, strict=True)]
    for part in [expansions] if same_transaction else [[expansion] for expansion in expansions]:
        await store.expand(part, NOW)
    assert await states(backend) == [("key", f"https://{HOST}/key", "pending")]
    assert await summary(backend) == [("batch", "pending", 1, 1, 0, 0, 0, 0)]


async def test_failed_takes_nothing_from_a_file_that_was_found(store: Engine, backend: Backend) -> None:
    await take_in(store, finished())
    await settle(store)
    before = await backend.rows(FILES)
    assert await take_in(store, failed(url="https://elsewhere.example/key")) == []
    assert await backend.rows(FILES) == before


async def test_several_deliveries_of_one_batch_in_one_transaction_merge_one_after_another(
    store: Engine, backend: Backend
) -> None:
    items = [await deliver(store, files, received_at=NOW + n) for n, files in enumerate((2, 2, 3, 1))]
    await store.expand(
        [
            chunk(items[0], finished("a", url="https://h/1"), finished("b")),
            chunk(items[1], finished("a", url="https://h/2"), failed("c")),
            chunk(items[2], finished("c"), finished("a", url="https://h/3"), last=False),
            chunk(items[2], finished("a", url="https://h/4")),
            chunk(items[3], finished("b")),
        ],
        NOW,
    )
    assert await states(backend) == [
        ("a", "https://h/4", "pending"),
        ("b", f"https://{HOST}/b", "pending"),
        ("c", f"https://{HOST}/c", "pending"),
    ]
    assert await summary(backend) == [("batch", "pending", 3, 3, 0, 0, 0, 0)]
    assert await backend.rows("SELECT deliveries, last_received_at FROM batch") == [(4, NOW + 3)]
    assert store.backlog == 3


# A key that is listed twice


LISTED_TWICE: list[tuple[list[NewFile], tuple[str | None, str]]] = [
    ([finished(url="https://h/1"), finished(url="https://h/2")], ("https://h/2", "pending")),
    ([finished(url="https://h/1"), blocked()], ("https://127.0.0.1/key", "blocked")),
    ([blocked(), finished(url="https://h/1")], ("https://h/1", "pending")),
    ([failed(), finished(url="https://h/1")], ("https://h/1", "pending")),
    ([finished(url="https://h/1"), failed()], ("https://h/1", "pending")),
    ([finished(url="https://h/1")] * 2, ("https://h/1", "pending")),
    ([failed()] * 2, (None, "upload_failed")),
]


@pytest.mark.parametrize(("files", "expected"), LISTED_TWICE)
@pytest.mark.parametrize("together", [True, False])
async def test_of_a_key_that_is_listed_twice_the_last_counts_as_if_it_came_later(
    store: Engine, backend: Backend, files: list[NewFile], expected: tuple[str | None, str], together: bool
) -> None:
    item = await deliver(store, 2)
    if together:
        await store.expand([chunk(item, *files)], NOW)
    else:
        await store.expand([chunk(item, files[0], last=False), chunk(item, files[1])], NOW)
    assert await states(backend) == [("key", *expected)]
    assert (await summary(backend))[0][2] == 1


async def test_a_delivery_that_lists_a_key_twice_is_a_no_op_when_it_comes_again(
    store: Engine, backend: Backend
) -> None:
    files = [finished(url="https://h/1"), finished(url="https://h/2")]
    await take_in(store, *files)
    await settle(store)
    before = await backend.rows(FILES)
    assert await take_in(store, *files) == []
    assert await backend.rows(FILES) == before


# Unavailable files that are reported again

MINUTE = 60_000


async def probe_in_vain(store: Engine, at: int) -> None:
    """Let a pending file turn out not to be there."""
    file = await claim_one(store, now=at)
    await store.record([missing(file, verified_at=at)], at)


async def states_after(store: Engine, backend: Backend, at: int, *files: NewFile) -> list[str]:
    await take_in(store, *files, now=at, received_at=at)
    return [state for _, _, state in await states(backend)]


async def test_identical_delivery_probes_an_unavailable_file_again_at_most_once_in_ten_minutes(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, finished(), received_at=NOW)
    await probe_in_vain(store, NOW)
    at = NOW + MINUTE
    assert await states_after(store, backend, at, finished()) == ["pending"]
    assert [row[1] for row in await summary(backend)] == ["pending"]
    file = await claim_one(store, now=at)
    assert file.attempts == 0
    await store.record([missing(file, verified_at=at)], at)
    for minutes in (0.1, 5, 9.99):
        assert await states_after(store, backend, at + round(minutes * MINUTE), finished()) == ["unavailable"]
    assert await states_after(store, backend, at + 10 * MINUTE, finished()) == ["pending"]


async def test_report_after_failed_probes_an_unavailable_file_again_however_soon_it_comes(
    store: Engine, backend: Backend
) -> None:
    await take_in(store, finished(), received_at=NOW)
    await probe_in_vain(store, NOW)
    assert await states_after(store, backend, NOW + 1, finished()) == ["pending"]
    await probe_in_vain(store, NOW + 2)
    assert await states_after(store, backend, NOW + 3, finished()) == ["unavailable"]
    assert await states_after(store, backend, NOW + 4, failed(url=finished().target_url)) == ["unavailable"]
    assert await states_after(store, backend, NOW + 5, finished()) == ["pending"]


async def test_identical_delivery_leaves_files_in_every_other_state_as_they_are(
    store: Engine, backend: Backend
) -> None:
    files = finished("available"), finished("pending"), blocked("blocked"), failed("failed")
    await take_in(store, *files, received_at=NOW)
    await store.record([found(file) for file in await claim(store) if "available" in file.target_url], NOW)
    before = await backend.rows(FILES)
    for later in (MINUTE, 20 * MINUTE, 40 * MINUTE):
        await take_in(store, *files, now=NOW + later, received_at=NOW + later)
        assert await backend.rows(FILES) == before


async def test_all_parts_of_one_identical_delivery_probe_their_files_again(store: Engine, backend: Backend) -> None:
    names = [f"{n}" for n in range(6)]
    await take_in(store, *map(finished, names), received_at=NOW)
    await store.record([missing(file) for file in await claim(store)], NOW)
    item = await deliver(store, 6, received_at=NOW + MINUTE)
    for start in (0, 2, 4):
        part = map(finished, names[start : start + 2])
        await store.expand([chunk(item, *part, last=start == 4)], NOW + MINUTE)
    assert {state for _, _, state in await states(backend)} == {"pending"}
