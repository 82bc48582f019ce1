"""What one host, one address or this machine's own shortage does to the files of others; and the bytes of addresses."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from notify_server.model import Evidence, Request
from tests.support.daemon import Config, Daemon
from tests.support.origin import SILENCE, Answer, Hit, Origin
from tests.support.prober import Prober

LOOPBACK = ["127.0.0.0/8"]


def only(verify: dict[str, Any]) -> Config:
    return {"verify": {"allowed_networks": LOOPBACK, "allowed_ports": [], "retry_schedule": ["1h"], **verify}}


@pytest_asyncio.fixture
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as serving:
        yield serving


# -- the bytes of an address ---


SIGNED = ["/%e6%88%bf%2fa.jpg?s=a%2fb%7e", "/a%2Fb%2fc?x=%2b%2B&y=%41", "/%7euser/./%2e%2e/x", "/x?sig=A%3d%3D"]


async def test_every_byte_of_an_address_reaches_the_server(tmp_path: Path, origin: Origin) -> None:
    plain = ["/plain?a=b", "/x/../y", "/a//b?c=d/../e"]
    async with Daemon(tmp_path, only({"concurrency": 2, "per_host_concurrency": 1})) as daemon:
        # Requests with and without escapes, one after the other, share the prober's handles.
        paths = [path for pair in zip(SIGNED, [*plain, "/last"], strict=True) for path in pair]
        files = await daemon.settle("b", [origin.url(path) for path in paths])
    assert {file["state"] for file in files.values()} == {"available"}
    assert sorted(hit.path for hit in origin.hits) == sorted(paths)


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/房/a.jpg".encode("gbk"), "/%B7%BF/a.jpg"),
        ("/房.jpg?k=房".encode(), "/%E6%88%BF.jpg?k=%E6%88%BF"),
        ("/é".encode("latin-1"), "/%E9"),
        (b"/%e9%2f", "/%e9%2f"),
        (b" \t/blank ", "/blank"),
    ],
)
async def test_bytes_of_a_location_reach_the_server(tmp_path: Path, origin: Origin, location: bytes, path: str) -> None:
    head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n"
    origin.on("/start", Answer(raw=head))
    async with Daemon(tmp_path, only({})) as daemon:
        (file,) = (await daemon.settle("b", [origin.url("/start")])).values()
    assert file["state"] == "available"
    assert [hit.path for hit in origin.hits] == ["/start", path]


async def test_blanks_and_a_byte_order_mark_around_a_target_url_are_trimmed(tmp_path: Path, origin: Origin) -> None:
    urls = [f" {origin.url('/a')}", f"{origin.url('/b')}\r\n", f"\ufeff{origin.url('/c')}\t "]
    async with Daemon(tmp_path, only({})) as daemon:
        files = await daemon.settle("b", urls)
    assert {file["state"] for file in files.values()} == {"available"}
    assert sorted(hit.path for hit in origin.hits) == ["/a", "/b", "/c"]


async def test_referer_is_sent_when_it_is_configured(tmp_path: Path, origin: Origin) -> None:
    async with Daemon(tmp_path, only({"referer": "https://www.example.com/"})) as daemon:
        await daemon.settle("b", [origin.url("/a")])
    (hit,) = origin.hits
    assert {name.lower(): value for name, value in hit.headers.items()}["referer"] == "https://www.example.com/"


# -- each hop is its own host's ---


async def test_circuit_of_a_live_host_stays_closed_when_its_redirects_lead_to_a_silent_one(
    tmp_path: Path, origin: Origin
) -> None:
    async with Origin("127.0.0.2") as silent:
        silent.default = SILENCE

        def answer(hit: Hit) -> Answer:
            return Answer(302, {"Location": silent.url(hit.path)}) if hit.path.startswith("/away") else Answer()

        origin.default = answer
        limits = {"timeout": "1s", "connect_timeout": "1s", "hosts": {"127.0.0.2": {"per_host_concurrency": 3}}}
        async with Daemon(tmp_path, only(limits)) as daemon:
            paths = [f"/{'away' if number % 2 else 'here'}/{number}" for number in range(200)]
            await daemon.deliver("b", [origin.url(path) for path in paths])
            here = "SELECT count(*) = 100 FROM file WHERE target_url LIKE '%/here/%' AND state = 'available'"
            await daemon.eventually(here)
            assert daemon.count("host does not answer, its files wait", host=f"127.0.0.1:{origin.port}") == 0
        # The redirects' target has its own limit.
        assert silent.busiest <= 3


async def test_files_that_wait_for_a_redirects_target_are_found_and_spend_no_attempt(
    tmp_path: Path, origin: Origin
) -> None:
    async with Origin("127.0.0.2") as slow:
        slow.default = Answer(delay=0.01)
        origin.default = lambda hit: Answer(302, {"Location": slow.url(hit.path)})
        limits = {"hosts": {"127.0.0.2": {"per_host_concurrency": 2}}}
        async with Daemon(tmp_path, only(limits)) as daemon:
            files = await daemon.settle("b", [origin.url(f"/{number}") for number in range(100)])
        assert {(file["state"], file["attempts"]) for file in files.values()} == {("available", 1)}
        assert slow.busiest <= 2


# -- limits hold for the dialled address ---


async def test_names_of_one_address_share_its_limit(tmp_path: Path, origin: Origin) -> None:
    origin.default = Answer(delay=0.02)
    async with Daemon(tmp_path, only({"per_host_concurrency": 4})) as daemon:
        urls = [origin.url(f"/{number}", f"n{number % 50}.localhost") for number in range(200)]
        files = await daemon.settle("b", urls)
    assert {(file["state"], file["attempts"]) for file in files.values()} == {("available", 1)}
    assert origin.busiest <= 8


# -- hosts that do not answer ---


async def test_silent_hosts_leave_half_of_the_slots_to_a_host_that_answers(tmp_path: Path, origin: Origin) -> None:
    async with Origin("0.0.0.0") as silent:
        silent.default = SILENCE
        config = only({"concurrency": 16, "timeout": "20s"})
        async with Daemon(tmp_path, config) as daemon:
            await daemon.settle("first", [origin.url("/first")])
            hosts = [f"http://127.1.{number // 250}.{number % 250 + 1}:{silent.port}/x" for number in range(500)]
            await daemon.deliver("silent", hosts)
            await silent.reached(8)
            # None of the silent requests has ended by now: their time-out is longer than this takes.
            files = await daemon.settle("good", [origin.url(f"/{number}") for number in range(200)])
        assert {file["state"] for file in files.values()} == {"available"}
        assert silent.busiest == 8


# -- this machine's own shortage ---


async def test_request_without_a_descriptor_left_is_a_shortage(origin: Origin) -> None:
    origin.default = Answer(delay=0.2)
    prober = await Prober.start()
    assert prober.process.pid is not None
    resource.prlimit(prober.process.pid, resource.RLIMIT_NOFILE, (24, 24))
    requests = [prober.request(origin.url(f"/{number}"), timeout=10, fresh=True) for number in range(60)]
    found = await prober.ask_all(requests)
    short = [evidence for evidence in found if evidence.shortage]
    assert short
    assert all(evidence.status is None for evidence in short)
    assert {evidence.status for evidence in found if not evidence.shortage} == {200}
    assert await prober.end() == 0


async def test_request_beyond_the_limit_of_an_address_is_not_sent(origin: Origin) -> None:
    gate = asyncio.Event()
    origin.default = Answer(gate=gate)
    prober = await Prober.start()
    requests = [
        Request(number, "HEAD", origin.url(f"/{number}"), 10_000, 10_000, address_limit=3) for number in range(1, 11)
    ]
    prober.send(requests)
    crowded: list[Evidence] = []
    while len(crowded) < 7:
        crowded += await prober.receive()
    assert all(evidence.crowded and evidence.remote_addr == "127.0.0.1" for evidence in crowded)
    gate.set()
    answered: list[Evidence] = []
    while len(answered) < 3:
        answered += await prober.receive()
    assert {evidence.status for evidence in answered} == {200}
    assert len(origin.hits) == 3
    assert await prober.end() == 0


async def test_files_are_charged_for_no_shortage_of_descriptors(tmp_path: Path, origin: Origin) -> None:
    origin.default = Answer(delay=0.05)
    async with Daemon(tmp_path, only({"concurrency": 100, "per_host_concurrency": 100})) as daemon:
        for pid in daemon.prober_pids():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (40, 40))
        files = await daemon.settle("b", [origin.url(f"/{number}") for number in range(300)])
        assert {(file["state"], file["attempts"]) for file in files.values()} == {("available", 1)}
        assert daemon.count("this machine is short of ports or descriptors: fewer files are probed at a time") == 1
