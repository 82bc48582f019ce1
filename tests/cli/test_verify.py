"""`verify`, as a user runs it: addresses in, unavailable ones out."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from notify_server.cli.address_queue import GIVE_UP_FAILURES, MAX_HOSTS, WINDOW, AddressQueue
from notify_server.cli.addresses import Entry
from notify_server.model import DueFile, FileResult, FileState, Reason
from notify_server.verify.guard import Guard
from tests.support.cli import on_terminal, running
from tests.support.daemon import Finished, run_command, to_toml
from tests.support.notification import batch_body, failed
from tests.support.origin import SILENCE, Answer, Origin

LOOPBACK = {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": []}
FIELDS = [
    "url", "state", "reason", "http_status", "content_length", "content_type", "final_url", "remote_addr", "elapsed_ms",
]  # fmt: skip


@pytest.fixture(autouse=True)
def config(tmp_path: Path) -> None:
    configure(tmp_path)


def configure(tmp_path: Path, **keys: object) -> None:
    (tmp_path / "config.toml").write_text(to_toml({"verify": LOOPBACK | keys}))


async def verify(folder: Path, *arguments: str) -> Finished:
    return await run_command("verify", *arguments, cwd=folder)


def by_url(text: str) -> dict[str, dict[str, Any]]:
    return {found["url"]: found for found in map(json.loads, text.splitlines())}


async def test_addresses_are_judged_as_the_daemon_judges_them(tmp_path: Path) -> None:
    async with Origin() as origin:
        origin.on("/there", Answer(headers={"Content-Length": "1234", "Content-Type": "image/jpeg"}))
        origin.on("/gone", Answer(404))
        origin.on("/moved", Answer(302, {"Location": "/there"}))
        origin.on("/get-only", Answer(403), Answer(206, {"Content-Range": "bytes 0-0/77"}, b"x"))
        origin.on("/inside", Answer(302, {"Location": "http://10.0.0.1/"}))
        urls = [origin.url(path) for path in ("/there", "/gone", "/moved", "/get-only", "/inside")]
        end = await verify(tmp_path, "--json", *urls, "http://169.254.169.254/latest", "no address\x1b[31m")
        methods = [hit.method for hit in origin.of("/get-only")]
    assert end.code == 1
    found = by_url(end.stdout)
    assert all(list(each) == FIELDS for each in found.values())
    told = {url: (each["state"], each["reason"], each["http_status"]) for url, each in found.items()}
    assert told == {
        urls[0]: ("available", None, 200),
        urls[1]: ("unavailable", "http_404", 404),
        urls[2]: ("available", None, 200),
        urls[3]: ("available", None, 206),
        urls[4]: ("blocked", "private_address", 302),
        "http://169.254.169.254/latest": ("blocked", "private_address", None),
        "no address\x1b[31m": ("blocked", "invalid_url", None),
    }
    there = found[urls[0]]
    assert (there["content_length"], there["content_type"], there["remote_addr"]) == (1234, "image/jpeg", "127.0.0.1")
    assert there["elapsed_ms"] > 0
    assert found[urls[2]]["final_url"] == urls[0]
    assert found[urls[3]]["content_length"] == 77
    assert "HEAD" in methods and methods[-1] == "GET"
    assert "\x1b" not in end.stdout
    assert re.fullmatch(
        r"7 URLs: 3 available, 1 unavailable, 3 blocked "
        r"\(private_address 2, .*\); [0-9.]+ s\n", end.stderr
    )  # fmt: skip


async def test_one_attempt_is_made_whatever_the_schedule_and_nothing_is_left_behind(tmp_path: Path) -> None:
    async with Origin() as origin:
        origin.default = Answer(500, close=True)
        end = await verify(tmp_path, origin.url("/broken"))
        # The only attempt is the last one, which ends with a GET.
        assert [hit.method for hit in origin.hits] == ["HEAD", "GET"]
    assert (end.code, end.stdout) == (1, f"unavailable\thttp_500\t{origin.url('/broken')}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


async def test_when_all_are_available_it_exits_0_and_names_none(tmp_path: Path) -> None:
    async with Origin() as origin:
        (tmp_path / "list").write_text("".join(f"{origin.url(f'/{number}')}\n" for number in range(500)))
        end = await verify(tmp_path, "--file", "list", origin.url("/one-more"))
        assert len(origin.hits) == 501
    assert (end.code, end.stdout) == (0, "")
    assert end.stderr.startswith("501 URLs: 501 available; ")


async def test_a_notification_is_verified_except_for_files_reported_failed(tmp_path: Path) -> None:
    async with Origin() as origin:
        (tmp_path / "body").write_bytes(batch_body("b", [origin.url("/a"), failed("k", origin.url("/b"))]))
        end = await verify(tmp_path, "-f", "body")
        assert [hit.path for hit in origin.hits] == ["/a"]
    assert (end.code, end.stdout) == (1, f"upload_failed\t-\t{origin.url('/b')}\n")


async def test_a_host_gets_no_more_concurrent_requests_than_configured(tmp_path: Path) -> None:
    configure(tmp_path, per_host_concurrency=3)
    async with Origin() as origin:
        gate = asyncio.Event()
        origin.default = Answer(gate=gate)
        asking = asyncio.create_task(verify(tmp_path, *(origin.url(f"/{number}") for number in range(20))))
        await origin.reached(3)
        gate.set()
        assert (await asking).code == 0
        assert origin.busiest == 3


@pytest.mark.parametrize("arguments", [["-f", "missing"], ["-f", "."], []])
async def test_a_list_that_cannot_be_had_exits_2_with_one_line(tmp_path: Path, arguments: list[str]) -> None:
    end = await verify(tmp_path, *arguments)
    assert (end.code, end.stdout) == (2, "")
    assert len(end.stderr.splitlines()) == 1


async def test_a_list_that_breaks_off_exits_2_with_what_was_known(tmp_path: Path) -> None:
    async with Origin() as origin:
        (tmp_path / "list").write_text(json.dumps({"url": origin.url("/a")}) + "\n[]\n")
        end = await verify(tmp_path, "-f", "list", "--json")
    assert end.code == 2
    assert list(by_url(end.stdout)) == [origin.url("/a")]
    assert "1 URL: 1 available" in end.stderr
    assert end.stderr.endswith('notify_server: list, line 2: must be an object a line, like {"target_url": "…"}\n')


async def test_a_wrong_configuration_exits_2_before_anything_is_asked(tmp_path: Path) -> None:
    configure(tmp_path, concurrency=0)
    async with Origin() as origin:
        end = await verify(tmp_path, origin.url("/a"))
        assert origin.connections == 0
    assert (end.code, end.stderr) == (2, "[verify] concurrency: must be at least 1, not 0\n")


async def test_addresses_are_requested_while_the_list_is_still_being_written(tmp_path: Path) -> None:
    async with Origin() as origin, running("verify", "--json", "-f", "-", cwd=tmp_path) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(f"{origin.url('/a')}\n".encode())
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        assert json.loads(line)["url"] == origin.url("/a")
        process.stdin.write(f"{origin.url('/b')}".encode())
        process.stdin.close()
        assert json.loads(await process.stdout.readline())["url"] == origin.url("/b")
        assert await process.wait() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_ends_it_at_once_with_the_results_so_far(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    async with Origin() as origin, running("verify", "--json", "-f", "-", cwd=tmp_path) as process:
        assert process.stdin and process.stdout and process.stderr
        origin.on("/silent", SILENCE)
        process.stdin.write(f"{origin.url('/silent')}\n{origin.url('/a')}\n".encode())
        await asyncio.wait_for(process.stdout.readline(), 20)
        await origin.reached(path="/silent")
        process.send_signal(number)
        # Standard input is still open, and the origin still silent.
        async with asyncio.timeout(5):
            assert await process.wait() == code
        summary = (await process.stderr.read()).decode()
    assert re.fullmatch(r"stopped: 1 URL: 1 available; 1 unsettled; [0-9.]+ s\n", summary)


async def test_a_reader_that_goes_away_ends_it_without_a_traceback(tmp_path: Path) -> None:
    async with Origin() as origin, running("verify", "--json", "-f", "-", cwd=tmp_path) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(f"{origin.url('/a')}\n".encode())
        await asyncio.wait_for(process.stdout.readline(), 20)
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        process.stdin.write(f"{origin.url('/b')}\n".encode())
        async with asyncio.timeout(10):
            assert await process.wait() == 1
        assert b"Traceback" not in await process.stderr.read()


async def test_a_host_that_cannot_be_reached_is_given_up_and_the_others_are_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    async with Origin() as origin:
        # More than may be in memory, and the dead host's first.
        lines = [f"{dead}/{number}" for number in range(WINDOW + 100)] + [origin.url(f"/{n}") for n in range(50)]
        (tmp_path / "list").write_text("\n".join(lines))
        end = await verify(tmp_path, "-f", "list", "--json")
        assert len(origin.hits) == 50
    found = by_url(end.stdout)
    assert end.code == 1
    assert found.keys() == set(lines)
    states = {found[url]["state"] for url in lines[:-50]}
    assert states == {"unavailable", "pending"}
    assert {found[url]["reason"] for url in lines[:-50]} == {"connect_error"}
    assert {found[url]["state"] for url in lines[-50:]} == {"available"}


async def test_a_terminal_shows_a_table_of_unavailable_files(tmp_path: Path) -> None:
    async with Origin() as origin:
        origin.on("/gone", Answer(410))
        origin.on("/moved", Answer(302, {"Location": "/gone"}))
        code, text = await on_terminal("verify", origin.url("/a"), origin.url("/moved"), "x\x1b]2;y", cwd=tmp_path)
    assert code == 1
    assert "Not available" in text
    row = next(line for line in text.splitlines() if origin.url("/moved") in line)
    assert re.search(r"unavailable  http_410 +http", row)
    assert f"-> {origin.url('/gone')}" in text
    assert origin.url("/a") not in text
    assert "x\\x1b]2;y" in text and "\x1b]2;" not in text
    assert "3 URLs: 1 available, 1 unavailable, 1 blocked" in text


async def test_on_a_terminal_the_progress_is_shown_and_taken_away_again(tmp_path: Path) -> None:
    async with Origin() as origin:
        (tmp_path / "list").write_text("".join(f"{origin.url(f'/{number}')}\n" for number in range(300)))
        code, text = await on_terminal("verify", "-f", "list", cwd=tmp_path)
    assert code == 0
    assert "0 not available" in text
    # The line is erased at the end, and only the summary stays.
    assert text.rpartition("\x1b[2K")[2].strip().startswith("300 URLs: 300 available")


# --- Memory ---


def listing() -> AddressQueue:
    return AddressQueue(Guard([], [], []))


def result(file: DueFile, reason: str | None, elapsed_ms: float) -> FileResult:
    """What an attempt on a file came to: it failed for this reason, or it was answered."""
    state, status = (FileState.UNAVAILABLE, None) if reason else (FileState.AVAILABLE, 200)
    nothing = (None,) * 6
    return FileResult(file, state, reason, 1, None, status, *nothing, elapsed_ms, 1)


async def test_no_more_is_read_than_may_be_in_memory() -> None:
    held = listing()
    await held.enter([Entry("http://a.example/")] * (WINDOW - 1) + [Entry("junk")])
    entering = asyncio.create_task(held.enter([Entry("http://b.example/")]))
    await asyncio.sleep(0)
    assert held.entered == WINDOW
    assert [outcome.reason for outcome in held.take()] == [Reason.INVALID_URL]
    await entering
    assert held.entered == WINDOW + 1


async def test_a_host_that_answers_again_is_no_longer_given_up() -> None:
    held = listing()
    await held.enter([Entry(f"http://a.example/{number}") for number in range(GIVE_UP_FAILURES + 2)])
    files = await held.claim([("a.example", GIVE_UP_FAILURES + 1)], 0)
    await held.record([result(file, "timeout", 6000.0) for file in files[: GIVE_UP_FAILURES - 1]], 0)
    assert (await held.due_hosts("", 10))[0].host == "a.example"
    await held.record([result(files[GIVE_UP_FAILURES - 1], "timeout", 6000.0)], 0)
    assert await held.due_hosts("", 10) == []
    assert held.take()[-1].state is FileState.PENDING
    await held.enter([Entry("http://a.example/x")])
    assert [(outcome.state, outcome.reason) for outcome in held.take()] == [(FileState.PENDING, "timeout")]
    await held.record([result(files[GIVE_UP_FAILURES], None, 1.0)], 0)
    await held.enter([Entry("http://a.example/y")])
    assert [file.target_url for file in await held.claim([("a.example", 9)], 0)] == ["http://a.example/y"]


async def test_hosts_whose_failures_are_remembered_are_bounded() -> None:
    held = listing()
    for start in range(0, MAX_HOSTS + 10, 1000):
        await held.enter([Entry(f"http://h{number}.example/") for number in range(start, start + 1000)])
        files = await held.claim([(due.host, 1) for due in await held.due_hosts("", 1000)], 0)
        await held.record([result(file, "timeout", 1.0) for file in files], 0)
        held.take()
    assert len(held._failing) == MAX_HOSTS
