"""The network around the daemon: names that lead to private places, name servers and routes that fail.

Every test has a network of its own, where any address can be listened on, and where look-ups are answered by the test.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, clean_environment
from tests.support.netns import SERVFAIL, SILENT, NameAnswer, Network
from tests.support.origin import Answer, Hit, Origin

PUBLIC = "93.184.216.34"
PUBLIC_6 = "2606:2800:220:1::1"
OTHER = "151.101.1.69"
# One of each private family.
PRIVATE = ["127.0.0.1", "10.1.2.3", "172.16.5.4", "192.168.7.8", "169.254.169.254", "100.64.0.1"]
PRIVATE_6 = ["::1", "fd00:ec2::254", "fe80::1", "::ffff:10.1.2.3", "64:ff9b::a01:203"]
HERE = [address for address in PRIVATE if address != "127.0.0.1"] + ["fd00:ec2::254", "64:ff9b::a01:203"]
PORT = 8000
# A machine's own addresses are private, and those of a test's network are; these stand for other machines'.
ELSEWHERE = ["93.184.216.0/24", OTHER, PUBLIC_6, "100.63.255.254", "100.128.0.1"]


def guarded(**verify: object) -> dict[str, dict[str, Any]]:
    """The guard as users have it, but for the port."""
    return {"verify": {"allowed_networks": ELSEWHERE, "allowed_ports": [PORT], "retry_schedule": [], **verify}}


@contextlib.asynccontextmanager
async def traps() -> AsyncIterator[list[Origin]]:
    """A listener on every private address there is."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Origin(host, PORT)) for host in ["127.0.0.1", "::1", *HERE]]


# --- Names that lead to private places ---


async def test_a_name_that_leads_to_a_private_place_is_blocked_and_nothing_there_is_dialled(tmp_path: Path) -> None:
    """Rows 23, 25 and 26: at once, at another name, among public addresses, in the end, and behind redirects."""
    async with Network(PUBLIC, PUBLIC_6, *HERE) as network, traps() as trapped:
        names = network.names
        private = [*PRIVATE, *PRIVATE_6]
        for number, address in enumerate(private):
            names.on(f"direct{number}.test", [address])
            names.on(f"alias{number}.test", ["between.test"])
        names.on("all.test", private)
        names.on("first-alias.test", ["second-alias.test"])
        names.on("second-alias.test", ["third-alias.test"])
        names.on("third-alias.test", ["10.1.2.3", "fd00:ec2::254"])
        names.on("public.test", [PUBLIC])
        urls = {f"direct{number}.test" for number in range(len(private))} | {"all.test", "first-alias.test"}
        async with Origin(PUBLIC, PORT) as origin, Daemon(tmp_path, guarded(), prefix=network.prefix) as daemon:
            for hop in range(5):
                for place in range(hop):
                    origin.on(f"/{hop}/{place}", Answer(302, {"Location": f"/{hop}/{place + 1}"}))
                origin.on(f"/{hop}/{hop}", Answer(302, {"Location": f"http://all.test:{PORT}/secret"}))
            files = await daemon.settle(
                "b",
                [
                    *(f"http://{name}:{PORT}/" for name in sorted(urls)),
                    *(f"http://public.test:{PORT}/{hop}/0" for hop in range(5)),
                ],
            )
            assert len(files) == len(private) + 2 + 5
            assert {(row["state"], row["reason"], row["attempts"]) for row in files.values()} == {
                ("blocked", "private_address", 1)
            }
            for hop in range(5):
                redirected = files[f"http://public.test:{PORT}/{hop}/0"]
                assert redirected["final_url"] == f"http://all.test:{PORT}/secret"
                assert len(daemon.attempts(redirected)) == hop + 2
            assert [trap.connections for trap in trapped] == [0] * len(trapped)
            # The look-ups were made: it is their answers that were refused.
            assert min(names.asked[name] for name in urls) >= 1


@pytest.mark.parametrize("public", [PUBLIC, PUBLIC_6])
async def test_of_a_name_with_public_and_private_addresses_only_the_public_one_is_dialled(
    tmp_path: Path, public: str
) -> None:
    """Row 24, in every order of the addresses."""
    async with Network(PUBLIC, PUBLIC_6, *HERE) as network, traps() as trapped, Origin(public, PORT) as origin:
        origin.default = Answer(close=True)
        private = [*PRIVATE, "::1", "fd00:ec2::254"]
        orders = [[*private[:place], public, *private[place:]] for place in range(len(private) + 1)]
        for number, order in enumerate(orders):
            network.names.on(f"mixed{number}.test", order)
        async with Daemon(tmp_path, guarded(), prefix=network.prefix) as daemon:
            files = await daemon.settle(
                "b", [f"http://mixed{number}.test:{PORT}/{n}" for number in range(len(orders)) for n in range(10)]
            )
            assert {(row["state"], row["remote_addr"]) for row in files.values()} == {("available", public)}
            assert origin.connections == len(files)
            assert [trap.connections for trap in trapped] == [0] * len(trapped)


async def test_a_name_that_is_bound_to_another_address_after_it_was_vetted_leads_nowhere(tmp_path: Path) -> None:
    """Row 25: with a TTL of 0 every look-up may have another answer. Each address is vetted when it is dialled."""
    async with Network(PUBLIC, *HERE) as network, traps() as trapped, Origin(PUBLIC, PORT) as origin:
        origin.default = Answer(close=True)
        turns: list[NameAnswer] = [[PUBLIC], ["127.0.0.1"], ["10.1.2.3"], [PUBLIC], ["169.254.169.254", "::1"]]
        hosts = [f"turn{number}.test" for number in range(40)]
        for number, host in enumerate(hosts):
            first = number % len(turns)
            network.names.on(host, *(turns[first:] + turns[:first]) * 20)
        async with Daemon(tmp_path, guarded(), prefix=network.prefix) as daemon:
            found = 0
            for batch in "abc":
                files = await daemon.settle(batch, [f"http://{host}:{PORT}/{n}" for n in range(7) for host in hosts])
                seen = {(row["state"], row["reason"], row["remote_addr"]) for row in files.values()}
                assert seen == {("available", None, PUBLIC), ("blocked", "private_address", None)}
                found += sum(row["state"] == "available" for row in files.values())
                # A prober keeps addresses for a minute; another one looks the names up again.
                await daemon.restart()
            assert origin.connections == found
            assert [trap.connections for trap in trapped] == [0] * len(trapped)
            # A look-up makes two queries, one for each family.
            assert min(network.names.asked[host] for host in hosts) >= 6


async def test_the_neighbours_of_a_private_network_are_dialled(tmp_path: Path) -> None:
    """Row 5."""
    neighbours = ["100.63.255.254", "100.128.0.1"]
    async with Network(*neighbours, "100.64.0.1", "100.127.255.254") as network, contextlib.AsyncExitStack() as stack:
        dialled = [await stack.enter_async_context(Origin(host, PORT)) for host in neighbours]
        trapped = [await stack.enter_async_context(Origin(host, PORT)) for host in ("100.64.0.1", "100.127.255.254")]
        async with Daemon(tmp_path, guarded(), prefix=network.prefix) as daemon:
            files = await daemon.settle("b", [origin.url("/") for origin in (*dialled, *trapped)])
            assert [files[origin.url("/")]["state"] for origin in dialled] == ["available"] * 2
            assert [files[origin.url("/")]["reason"] for origin in trapped] == ["private_address"] * 2
            assert [origin.connections for origin in (*dialled, *trapped)] == [1, 1, 0, 0]


async def test_the_environments_proxies_are_not_asked(tmp_path: Path) -> None:
    """Row 31: they would dial in the daemon's place, whatever the guard says."""
    async with Network(PUBLIC, OTHER) as network, Origin(PUBLIC, PORT) as origin, Origin(OTHER, PORT) as proxy:
        address = proxy.url("")
        environ = clean_environment(
            **{name: address for lower in ("http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper())}
        )
        async with Daemon(tmp_path, guarded(), prefix=network.prefix, environ=environ) as daemon:
            files = await daemon.settle("b", [origin.url("/file")])
            assert files[origin.url("/file")]["state"] == "available"
            assert (origin.connections, proxy.connections) == (1, 0)


# --- Our own side fails ---

CUT_OFF = "no host answers: files wait, no attempts are spent"
BACK = "connected again"
# Spent long before what the tests below take is over.
SHORT = ["50ms", "50ms"]
# A file that fails before any other host was tried has spent an attempt: there was no host to compare with.
SPENT = "SELECT count(*) FROM file WHERE state NOT IN ('pending', 'available') OR attempts > 1"


@pytest.mark.parametrize("trouble", [SILENT, SERVFAIL])
async def test_while_no_name_server_answers_nothing_is_spent_and_literal_addresses_go_on(
    tmp_path: Path, trouble: NameAnswer
) -> None:
    """Row 80."""
    async with Network(PUBLIC, OTHER) as network, Origin(PUBLIC, PORT) as origin, Origin(OTHER, PORT) as literal:
        hosts = [f"host{number}.test" for number in range(40)]
        for host in hosts:
            network.names.on(host, [PUBLIC])
        network.names.on_all(trouble)
        config = guarded(retry_schedule=SHORT, connect_timeout="500ms")
        async with Daemon(tmp_path, config, prefix=network.prefix) as daemon:
            await daemon.deliver("names", [f"http://{host}:{PORT}/{n}" for host in hosts for n in range(5)])
            await daemon.line(CUT_OFF, to="name servers")
            files = await daemon.settle("literal", [literal.url(f"/{n}") for n in range(500)])
            assert {row["state"] for row in files.values()} == {"available"}
            # Long enough for the schedule of every file to be spent many times over.
            asked = sum(network.names.asked.values())
            await network.names.bell.until(lambda: sum(network.names.asked.values()) >= asked + 6)
            assert daemon.value(SPENT) == 0
            assert daemon.count(BACK) == 0
            network.names.on_all()
            assert (await daemon.verdict("names"))["verdict"] == "complete"
            assert daemon.count(BACK, to="name servers") == 1
            assert daemon.value("SELECT max(attempts) FROM file") <= 2
            assert len(origin.hits) == 200


async def test_a_name_that_does_not_exist_spends_its_schedule_though_no_other_name_is_looked_up(tmp_path: Path) -> None:
    """Row 80: a name server that says so is not out."""
    async with Network() as network, Daemon(tmp_path, guarded(retry_schedule=SHORT), prefix=network.prefix) as daemon:
        files = await daemon.settle("b", [f"http://none{number}.test:{PORT}/" for number in range(20)])
        assert {(row["state"], row["reason"], row["attempts"]) for row in files.values()} == {
            ("unavailable", "dns_error", 3)
        }
        assert daemon.count(CUT_OFF) == 0


async def test_a_zone_whose_name_server_keeps_silent_does_not_hold_up_the_look_ups_of_others(tmp_path: Path) -> None:
    """Row 99: the time of a look-up that has not begun is charged to no file."""
    async with Network(PUBLIC) as network, Origin(PUBLIC, PORT) as origin:
        for number in range(160):
            network.names.on(f"n{number}.silent.test", SILENT)
        good = [f"files{number}.test" for number in range(100)]
        for name in good:
            network.names.on(name, [PUBLIC])
        async with Daemon(tmp_path, guarded(connect_timeout="3s"), prefix=network.prefix) as daemon:
            await daemon.deliver("silent", [f"http://n{number}.silent.test:{PORT}/" for number in range(160)])
            await network.names.bell.until(lambda: any(name.endswith(".silent.test") for name in network.names.asked))
            files = await daemon.settle("good", [f"http://{name}:{PORT}/" for name in good])
            assert {(row["state"], row["reason"], row["attempts"]) for row in files.values()} == {
                ("available", None, 1)
            }
            assert len(origin.hits) == 100
            # The silent zone's files are charged once they have been looked up themselves.
            waiting = daemon.value("SELECT count(*) FROM file WHERE attempts = 0 AND state = 'pending'")
            assert waiting > 0


async def test_the_one_name_that_is_not_answered_for_spends_its_schedule(tmp_path: Path) -> None:
    """Row 80: where other names are looked up all the time, it is that name's own fault."""
    async with Network(PUBLIC) as network, Origin(PUBLIC, PORT) as origin:
        network.names.on("good.test", [PUBLIC])
        network.names.on("bad.test", SERVFAIL)
        async with Daemon(tmp_path, guarded(retry_schedule=SHORT), prefix=network.prefix) as daemon:
            await daemon.deliver("good", [f"http://good.test:{PORT}/{n}" for n in range(300)])
            files = await daemon.settle("bad", [f"http://bad.test:{PORT}/"])
            assert {(row["state"], row["reason"], row["attempts"]) for row in files.values()} == {
                ("unavailable", "dns_error", 3)
            }
            await daemon.verdict("good")
            assert len(origin.hits) == 300
            assert daemon.count(CUT_OFF) == 0


@pytest.mark.parametrize("fate", ["silent", "unreachable", "no route"])
async def test_while_there_is_no_way_out_callbacks_are_acked_and_files_wait(tmp_path: Path, fate: str) -> None:
    """Row 81."""
    addresses = [f"93.184.216.{last}" for last in range(1, 21)]
    async with Network(*addresses) as network, contextlib.AsyncExitStack() as stack:
        origins = [await stack.enter_async_context(Origin(address, PORT)) for address in addresses]
        config = guarded(retry_schedule=SHORT, connect_timeout="300ms")
        async with Daemon(tmp_path, config, prefix=network.prefix) as daemon:
            network.elsewhere(fate)
            network.remove(*addresses)
            await daemon.deliver("b", [origin.url(f"/{n}") for origin in origins for n in range(20)])
            await daemon.line(CUT_OFF, to="network")
            loop = asyncio.get_running_loop()
            for number in range(20):
                await daemon.deliver(f"while-{number}", [origins[number].url("/while")])
            # Many times as long as the schedule takes.
            started = loop.time()
            while loop.time() - started < 1.5:
                await daemon.deliver("while-0", [origins[0].url("/while")])
            assert daemon.value(SPENT) == 0
            network.add(*addresses)
            assert (await daemon.verdict("b"))["verdict"] == "complete"
            for number in range(20):
                assert (await daemon.verdict(f"while-{number}"))["verdict"] == "complete"
            assert daemon.count(BACK, to="network") == 1
            assert daemon.value("SELECT max(attempts) FROM file") <= 2


async def test_a_way_out_that_is_lost_with_requests_under_way_costs_no_file_its_last_attempt(tmp_path: Path) -> None:
    """Row 81: no file is on its last attempt at the wrong moment. Here each is: there is no other."""
    addresses = [f"93.184.216.{last}" for last in range(1, 6)]
    async with Network(*addresses) as network, contextlib.AsyncExitStack() as stack:
        origins = [await stack.enter_async_context(Origin(address, PORT)) for address in addresses]
        lost = asyncio.Event()

        def answer(hit: Hit) -> Answer:
            # Once so many have been answered the way is lost, in the middle of it all.
            if sum(len(origin.hits) for origin in origins) == 200:
                network.remove(*addresses)
                lost.set()
            return Answer(close=True)

        for origin in origins:
            origin.default = answer
        async with Daemon(tmp_path, guarded(connect_timeout="300ms", timeout="1s"), prefix=network.prefix) as daemon:
            await daemon.deliver("b", [origin.url(f"/{n}") for origin in origins for n in range(100)])
            await lost.wait()
            await daemon.line(CUT_OFF, to="network")
            network.add(*addresses)
            await daemon.verdict("b")
            # What was connected when the way was lost may have been cut short: that is a host's silence, and counts.
            reached = daemon.value("SELECT count(*) FROM file WHERE state = 'available'")
            cut_short = daemon.value(
                "SELECT count(DISTINCT file) FROM attempt WHERE reason IS NOT NULL AND connect_ms > 0"
            )
            assert reached + cut_short >= 500
            assert daemon.value("SELECT count(*) FROM attempt WHERE reason IS NOT NULL AND connect_ms IS NULL") == 0


async def test_a_dead_host_spends_its_schedule_while_another_answers(tmp_path: Path) -> None:
    """Row 81: the fault of one host is charged to its files."""
    async with Network(PUBLIC) as network, Origin(PUBLIC, PORT) as origin:
        config = guarded(retry_schedule=SHORT, connect_timeout="200ms")
        async with Daemon(tmp_path, config, prefix=network.prefix) as daemon:
            origin.default = Answer(delay=0.02)
            await daemon.deliver("good", [origin.url(f"/{n}") for n in range(1500)])
            files = await daemon.settle("dead", [f"http://{OTHER}:{PORT}/{n}" for n in range(3)])
            assert {(row["state"], row["reason"], row["attempts"]) for row in files.values()} == {
                ("unavailable", "timeout", 3)
            }
            await daemon.verdict("good")


async def test_the_only_host_there_is_spends_its_schedule_though_nothing_else_answers(tmp_path: Path) -> None:
    """Row 81: without another host to compare it with, a host that does not answer is a dead host."""
    config = guarded(retry_schedule=SHORT, connect_timeout="200ms")
    async with Network() as network, Daemon(tmp_path, config, prefix=network.prefix) as daemon:
        files = await daemon.settle("b", [f"http://{PUBLIC}:{PORT}/{n}" for n in range(3)])
        assert {(row["state"], row["reason"], row["attempts"]) for row in files.values()} == {
            ("unavailable", "timeout", 3)
        }
        assert daemon.count(CUT_OFF) == 0
