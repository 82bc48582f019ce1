"""The files of deploy/: each is checked by the program that reads it, or followed step by step.

Images are not built here, which takes a container engine: the Dockerfile's own commands are run without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import yaml

from notify_server.config import Config, load_config
from tests.bench.servers import running, tool
from tests.support.daemon import Daemon, Finished, clean_environment
from tests.support.notification import batch_body, finished
from tests.support.origin import SILENCE, Origin
from tests.support.postgres import fetch, new_schema
from tests.support.waiting import eventually, free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "notify-server.service").read_text("utf-8")
NGINX = (DEPLOY / "nginx.conf").read_text("utf-8")
PROGRAM = Path(sys.executable).with_name("notify-server")
INSTALLED = "/opt/notify-server"
# As many nodes as nginx.conf names.
NODES = ("node1", "node2")
TOKEN = "token-of-the-platform"
CALLER = "127.0.0.9"
SECONDS = 60.0


def run(*command: str, check: bool = True) -> Finished:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return Finished(done.returncode, done.stdout, done.stderr, 0)


# --- systemd ---


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with the program that is installed here."""
    path = tmp_path / "notify-server.service"
    assert f"ExecStart={INSTALLED}/bin/notify-server " in UNIT
    path.write_text(UNIT.replace(f"{INSTALLED}/bin/notify-server", str(PROGRAM)), "utf-8")
    return path


def setting(name: str) -> list[str]:
    """What the unit sets, one entry for each time that it does."""
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def test_systemd_has_nothing_to_say_against_the_unit(unit: Path) -> None:
    done = run("systemd-analyze", "verify", str(unit))
    assert (done.stdout, done.stderr) == ("", "")


def test_systemd_finds_what_the_service_is_exposed_to_small(unit: Path) -> None:
    """1.4 of 10: it has to be on the network."""
    run("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=15", str(unit))


def test_systemd_is_more_patient_than_the_servers_grace() -> None:
    (stop,) = setting("TimeoutStopSec")
    assert int(stop) > Config().server.shutdown_grace


def test_the_unit_is_restarted_without_end_but_for_a_wrong_configuration() -> None:
    """Row 127."""
    assert setting("Restart") == ["always"]
    assert setting("StartLimitIntervalSec") == ["0"]
    assert setting("RestartPreventExitStatus") == ["2"]


async def test_the_server_reports_to_systemd_as_the_unit_expects(tmp_path: Path) -> None:
    """Row 127."""
    assert setting("Type") == ["notify"]
    (watchdog,) = setting("WatchdogSec")
    assert int(watchdog) > 10
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        environ = clean_environment(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
        heard: list[bytes] = []
        # Read while the daemon starts, as systemd does: the socket holds few messages, and later ones are lost.
        asyncio.get_running_loop().add_reader(systemd, lambda: heard.append(systemd.recv(1000)))

        async def hear(wanted: bytes, number: int = 1) -> None:
            await eventually(lambda: sum(message.startswith(wanted) for message in heard) >= number)

        async with Daemon(tmp_path / "daemon", environ=environ) as daemon:
            await hear(b"READY=1\nSTATUS=ready for notifications")
            await hear(b"WATCHDOG=1", 5)
            daemon.send(signal.SIGTERM)
            await hear(b"STOPPING=1")
            assert await daemon.exit_code() == 0
        asyncio.get_running_loop().remove_reader(systemd)


async def test_a_server_that_waits_for_its_database_is_up_for_systemd_and_says_for_what(tmp_path: Path) -> None:
    """Row 127."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        environ = clean_environment(NOTIFY_SOCKET=str(tmp_path / "notify"))
        daemon = Daemon(tmp_path / "daemon", {"store": {"url": "postgresql://u:geheim@127.0.0.1:1/d"}}, environ=environ)
        starting = asyncio.create_task(daemon.start())
        async with asyncio.timeout(SECONDS):
            message = await asyncio.get_running_loop().sock_recv(systemd, 1000)
        assert message.startswith(b"READY=1\nSTATUS=waiting for the database: postgresql://127.0.0.1:1/d: cannot be")
        assert await daemon.terminate() == 0
        with pytest.raises(AssertionError, match="ended"):
            await starting


def calls_of(group: str) -> set[str]:
    """The system calls of one of systemd's groups."""
    calls: set[str] = set()
    for line in run("systemd-analyze", "syscall-filter", "--no-pager", group).stdout.splitlines()[1:]:
        name = line.strip()
        if name.startswith("@"):
            calls |= calls_of(name)
        elif name and not name.startswith("#"):
            calls.add(name)
    return calls


async def test_a_server_that_works_makes_no_system_call_that_the_unit_forbids(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    prefix = ["strace", "-f", "-qq", "-s", "0", "-o", str(trace)]
    async with Origin() as origin, Daemon(tmp_path / "daemon", prefix=prefix) as daemon:
        # A name, so that one is looked up.
        await daemon.deliver("b", [finished(origin.url(f"/{n}", "localhost"), f"{n}") for n in range(20)])
        assert (await daemon.verdict("b"))["verdict"] == "complete"
        (pid,) = map(int, Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split())
        os.kill(pid, signal.SIGTERM)
        assert await daemon.exit_code() == 0
    made = trace.read_text("utf-8", "replace").splitlines()
    # What a process is begun with is made for it by systemd as well.
    calls = {found[1] for line in made if (found := re.match(r"[0-9]+ +([a-z_0-9]+)\(", line))}
    assert {"execve", "sendto", "fdatasync"} <= calls
    allowed, *forbidden = setting("SystemCallFilter")
    assert forbidden
    assert calls - calls_of(allowed) == set()
    # SQLite's, of root's files and only when it is root.
    calls -= {"fchown"}
    assert [name for group in forbidden for name in calls & calls_of(group.removeprefix("~"))] == []
    # MemoryDenyWriteExecute.
    assert [line for line in made if re.search(r" mprotect\(.*PROT_EXEC| mmap\(.*PROT_WRITE\|PROT_EXEC", line)] == []
    (families,) = setting("RestrictAddressFamilies")
    used = {found[1] for line in made if (found := re.search(r" socket(?:pair)?\((\w+)", line))}
    assert "AF_INET" in used
    assert used <= set(families.split())


# --- The image ---


class Dockerfile(NamedTuple):
    """The stages of a Dockerfile, each a list of its instructions with what follows them."""

    stages: list[list[tuple[str, str]]]

    @classmethod
    def read(cls) -> Dockerfile:
        text = (DEPLOY / "Dockerfile").read_text("utf-8")
        plain = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
        stages: list[list[tuple[str, str]]] = []
        for line in filter(str.strip, plain.splitlines()):
            instruction, _, rest = line.strip().partition(" ")
            if instruction == "FROM":
                stages.append([])
            if stages:
                stages[-1].append((instruction, rest.strip()))
        return cls(stages)

    def of(self, stage: int, instruction: str) -> list[str]:
        """What follows each of these instructions in a stage."""
        return [rest for name, rest in self.stages[stage] if name == instruction]

    @property
    def variables(self) -> dict[str, str]:
        """What the image sets in the environment."""
        pairs = (pair.partition("=") for rest in self.of(-1, "ENV") for pair in shlex.split(rest))
        return {name: value for name, _, value in pairs}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the first stage makes, made by its own commands from the files that it copies."""
    folder = tmp_path_factory.mktemp("image")
    source, installed = folder / "source", folder / "installed"
    source.mkdir()
    dockerfile = Dockerfile.read()
    for rest in dockerfile.of(0, "COPY"):
        *names, _ = rest.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / name)
    for command in dockerfile.of(0, "RUN"):
        # What has been fetched before need not be again.
        here = command.replace(INSTALLED, str(installed)).replace("--no-cache-dir", "")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-ec", here], cwd=source, env={**os.environ, "PATH": path}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    yield installed
    shutil.rmtree(folder, ignore_errors=True)


def test_the_image_has_only_what_it_needs_and_runs_under_any_user(image: Path) -> None:
    dockerfile = Dockerfile.read()
    assert dockerfile.of(-1, "COPY") == [f"--from=build {INSTALLED} {INSTALLED}"]
    assert not list(image.glob("bin/pip*")) + list(image.glob("lib/*/site-packages/pip"))
    (user,) = dockerfile.of(-1, "USER")
    assert all(int(part) > 0 for part in user.split(":"))
    (volume,), (folder,) = dockerfile.of(-1, "VOLUME"), dockerfile.of(-1, "WORKDIR")
    assert Path(folder) / Config().store.path.parent == Path(volume)
    # All that is copied is let through to the engine.
    let_in = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    copied = {name for rest in dockerfile.of(0, "COPY") for name in rest.split()[:-1]}
    assert {f"!{name}" for name in copied} == {line for line in let_in if line.startswith("!")}


async def test_what_the_image_holds_serves_and_its_health_check_tells_whether_it_does(
    image: Path, tmp_path: Path
) -> None:
    dockerfile = Dockerfile.read()
    port = free_port()
    (tmp_path / "data").mkdir()
    own = {name: value.replace(INSTALLED, str(image)) for name, value in dockerfile.variables.items()}
    own["PATH"] = own["PATH"].replace("$PATH", os.environ["PATH"])
    # Nothing is to be reached from elsewhere here.
    assert own["NOTIFY_SERVER__SERVER__HOST"] == "0.0.0.0"
    own |= {"NOTIFY_SERVER__SERVER__HOST": "127.0.0.1", "NOTIFY_SERVER__SERVER__PORT": str(port)}
    environment = {name: value for name, value in clean_environment(**own).items() if name != "PYTHONPATH"}
    (check,) = dockerfile.of(-1, "HEALTHCHECK")
    health = json.loads(check.partition(" CMD ")[2])
    assert "8080" in dockerfile.of(-1, "EXPOSE")

    async def healthy() -> bool:
        command = [part.replace("8080", str(port)) for part in health]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        return await process.wait() == 0

    assert not await healthy()
    (entry,), (command,) = dockerfile.of(-1, "ENTRYPOINT"), dockerfile.of(-1, "CMD")
    process = await asyncio.create_subprocess_exec(
        *json.loads(entry), *json.loads(command), cwd=tmp_path, env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await eventually(healthy)
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"http://127.0.0.1:{port}/notify", data=batch_body("b", []), headers={"Content-Type": "text/json"}
            ) as answer,
        ):
            assert answer.status == 200
        # Pages and everything else that is not code came along.
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/") as page:
            assert page.status == 200
        assert (tmp_path / "data" / "notify.db").exists()
    finally:
        process.terminate()
        assert await process.wait() == 0
    assert not await healthy()


async def test_docker_stop_ends_a_server_that_waits_for_a_silent_host_in_order(tmp_path: Path) -> None:
    """Row 133."""
    assert Dockerfile.read().of(-1, "STOPSIGNAL") == ["SIGTERM"]
    docker_stop_seconds = 10.0
    assert Config().server.shutdown_grace < docker_stop_seconds
    async with Origin() as origin, Daemon(tmp_path) as daemon:
        origin.default = SILENCE
        await daemon.deliver("b", [finished(origin.url(f"/{n}"), f"{n}") for n in range(50)])
        await origin.reached(20)
        # Docker sends SIGKILL then.
        assert await daemon.terminate(seconds=docker_stop_seconds) == 0


# --- Compose ---


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def secrets() -> dict[str, str]:
    """What env.example sets."""
    lines = (DEPLOY / "env.example").read_text("utf-8").splitlines()
    return dict(re.fullmatch(r"(\w+)=(.+)", line).groups() for line in lines if line and line[0] != "#")  # type: ignore[union-attr, misc]


def environment_of(service: Mapping[str, Any]) -> dict[str, str]:
    """A service's environment, with what Compose fills in."""

    def fill(value: str) -> str:
        return re.sub(r"\$\{(\w+):[?-][^}]*\}", lambda found: secrets()[found[1]], value)

    return {name: fill(str(value)) for name, value in service.get("environment", {}).items()}


def test_every_key_that_compose_and_the_image_set_is_one_and_has_a_value_that_is_right(compose: Any) -> None:
    for name in NODES:
        service = compose["services"][name]
        assert service["env_file"] == ".env"
        ours = Dockerfile.read().variables | secrets() | environment_of(service)
        config = load_config(None, environ=ours, cwd=DEPLOY)
        assert config.store.is_postgres
        assert config.server.takes_callbacks and config.server.probes
        assert config.auth.callback_token is not None and config.auth.admin_token is not None
        assert ours["PGPASSWORD"] == environment_of(compose["services"]["postgres"])["POSTGRES_PASSWORD"]
        assert int(service["stop_grace_period"].removesuffix("s")) > config.server.shutdown_grace


def test_what_compose_refers_to_is_there(compose: Any) -> None:
    services = compose["services"]
    assert set(services) == {"postgres", "nginx", *NODES}
    for service in services.values():
        assert ("image" in service, service["restart"]) == (True, "unless-stopped")
        for wanted, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            # The servers' is in the image.
            assert wanted in NODES or "healthcheck" in services[wanted]
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in compose["volumes"]
    for name in NODES:
        build = services[name]["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
    assert (DEPLOY / "env.example").is_file()
    assert "deploy/.env" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


def test_the_servers_believe_nginx_alone_and_nginx_leads_to_the_servers(compose: Any) -> None:
    services = compose["services"]
    addresses = {name: service["networks"]["default"]["ipv4_address"] for name, service in services.items()}
    assert len(set(addresses.values())) == len(addresses)
    subnet = ipaddress.ip_network(compose["networks"]["default"]["ipam"]["config"][0]["subnet"])
    assert all(ipaddress.ip_address(address) in subnet for address in addresses.values())
    for name in NODES:
        assert environment_of(services[name])["NOTIFY_SERVER__SERVER__TRUSTED_PROXIES"] == addresses["nginx"]
        assert "ports" not in services[name]
    assert "ports" not in services["postgres"]
    assert f"location = {Config().server.callback_path} {{" in NGINX
    upstream = re.findall(r"^\s+server (\w+):(\d+)", NGINX, re.MULTILINE)
    assert upstream == [(name, str(Config().server.port)) for name in NODES]
    ((published),) = services["nginx"]["ports"]
    assert published.endswith(":" + re.findall(r"^\s+listen (\d+)", NGINX, re.MULTILINE)[0])


# --- nginx ---


class Front(NamedTuple):
    """nginx in front of the daemons, in a folder of its own."""

    url: str
    folder: Path

    def logs(self) -> str:
        return "".join((self.folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr"))


# The folders of tests are their owner's alone.
AS_ROOT = "user root root;" if os.geteuid() == 0 else ""


def nginx_conf(folder: Path, port: int, nodes: Mapping[str, int]) -> list[str]:
    """The command that runs nginx as deploy/ has it, at other addresses and with its files in the folder."""
    folder.mkdir()
    changes = {
        "listen 8080": f"listen 127.0.0.1:{port}",
        "/tmp/": f"{folder}/",
        "/dev/stdout": f"{folder}/stdout",
        "/dev/stderr": f"{folder}/stderr",
        **{f"server {name}:8080": f"server 127.0.0.1:{node}" for name, node in nodes.items()},
    }
    text = NGINX
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text, "utf-8")
    return [
        tool("nginx"), "-e", f"{folder}/stderr", "-p", str(folder), "-c", f"{folder}/nginx.conf",
        "-g", f"daemon off; {AS_ROOT}",
    ]  # fmt: skip


def test_nginx_has_nothing_to_say_against_its_configuration(tmp_path: Path) -> None:
    command = nginx_conf(tmp_path / "nginx", free_port(), {"node1": 1001, "node2": 1002})
    done = run(*command, "-t")
    assert "successful" in done.stderr
    assert not re.search(r"\[(warn|error|emerg)\]", done.stderr + (tmp_path / "nginx" / "stderr").read_text())


def port_of(daemon: Daemon) -> int:
    return int(re.findall(r":(\d+)/", daemon.callback)[0])


@contextlib.asynccontextmanager
async def behind_nginx(folder: Path, url: str) -> AsyncIterator[tuple[Front, list[Daemon]]]:
    """Two daemons on one database, and nginx in front."""
    config: dict[str, dict[str, Any]] = {
        "server": {"trusted_proxies": ["127.0.0.1"]},
        "auth": {"callback_token": TOKEN, "admin_token": "token-of-the-administrator"},
        "store": {"url": url, "lease": "5s"},
    }
    async with contextlib.AsyncExitStack() as stack:
        daemons = [await stack.enter_async_context(Daemon(folder / name, config)) for name in NODES]
        await asyncio.gather(*(daemon.line("sharing the work", nodes=len(NODES)) for daemon in daemons))
        port = free_port()
        command = nginx_conf(folder / "nginx", port, dict(zip(NODES, map(port_of, daemons), strict=True)))
        stack.enter_context(running(command, port))
        yield Front(f"http://127.0.0.1:{port}", folder / "nginx"), daemons


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_nginx_on_the_same_machine_opens_nothing_of_a_server_without_a_configured_token(
    tmp_path: Path, version: str
) -> None:
    """A proxy as people write one: it adds no header, and connects from a loopback address."""
    async with Daemon(tmp_path / "daemon") as daemon:
        port = free_port()
        folder = tmp_path / "nginx"
        folder.mkdir()
        names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{name}_temp_path {folder}/{name};" for name in names)
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/pid; error_log stderr crit; events {{}}\n"
            f"http {{ access_log off; proxy_http_version {version};\n"
            f"{temporary}\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{\n"
            f"proxy_pass http://127.0.0.1:{port_of(daemon)}; proxy_set_header Host localhost; }} }} }}\n"
        )
        with running([tool("nginx"), "-p", str(folder), "-c", f"{folder}/nginx.conf", "-g", AS_ROOT], port):
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                for path in ("/api/v1/totals", "/openapi.json", "/api/v1/export"):
                    async with session.get(path) as answer:
                        assert answer.status == 401
                async with session.post("/api/v1/prune", json={"rejected_before": "2030-01-01T00:00:00Z"}) as answer:
                    assert answer.status == 401
                async with session.get("/") as page:
                    assert page.url.path == "/ui/login"
                async with session.get("/api/v1/totals", headers=daemon.admin) as answer:
                    assert answer.status == 200


@pytest.fixture
async def caller() -> AsyncIterator[aiohttp.ClientSession]:
    """Who calls back, from an address of its own."""
    connector = aiohttp.TCPConnector(limit=0, local_addr=(CALLER, 0))
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=SECONDS)) as session:
        yield session


async def post(caller: aiohttp.ClientSession, front: Front, body: bytes) -> tuple[int, Mapping[str, str], Any]:
    headers = {"Content-Type": "application/json"}
    async with caller.post(f"{front.url}/notify?token={TOKEN}", data=io.BytesIO(body), headers=headers) as answer:
        return answer.status, answer.headers, await answer.json()


async def test_a_server_that_is_killed_behind_nginx_costs_no_notification_and_callers_only_what_was_in_flight(
    tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    url = await new_schema()
    posters, enough = 8, 300
    acked: list[str] = []
    again = 0
    killed = asyncio.Event()
    acked_since = 0
    numbers = itertools.count(1)
    async with Origin() as origin, behind_nginx(tmp_path, url) as (front, daemons):

        async def send() -> None:
            nonlocal again, acked_since
            while acked_since < enough:
                batch = f"b{next(numbers)}"
                body = batch_body(batch, [finished(origin.url(f"/{batch}"), batch)])
                while True:
                    status, headers, answer = await post(caller, front, body)
                    if status == 200:
                        break
                    # In the platform's form, to be sent again.
                    assert (status, answer["code"], headers["Retry-After"]) == (503, "503", "5"), answer
                    assert answer["request_id"]
                    again += 1
                acked.append(batch)
                acked_since += killed.is_set()
                if len(acked) == enough and not killed.is_set():
                    killed.set()
                    daemons[0].send(signal.SIGKILL)

        await asyncio.gather(*(send() for _ in range(posters)))
        await daemons[0].exit_code()
        assert again <= posters
        kept = {batch for (batch,) in await fetch(url, "SELECT batch_id FROM notification")}
        assert set(acked) - kept == set()
        assert len(acked) == len(set(acked)) >= 2 * enough

        async def settled() -> bool:
            rows = await fetch(url, "SELECT count(*) FROM batch WHERE verdict = 'complete'")
            return rows == [(len(acked),)]

        await eventually(settled)
        # Both had their part, and both have recorded who called, as nginx said.
        assert len({line.split()[5] for line in front.logs().splitlines() if '" 200 ' in line}) >= 2
        assert await fetch(url, "SELECT DISTINCT remote_addr FROM notification") == [(CALLER,)]

        # Without any server, callers get the same answer.
        await daemons[1].kill()
        status, headers, answer = await post(caller, front, batch_body("last", []))
        assert (status, answer["code"], answer["data"], headers["Retry-After"]) == (503, "503", None, "5")
        assert TOKEN not in front.logs()


async def test_a_server_that_hangs_behind_nginx_is_left_out_and_every_callback_is_acked(
    tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    """Row 131."""
    url = await new_schema()
    async with behind_nginx(tmp_path, url) as (front, daemons):
        daemons[0].send(signal.SIGSTOP)
        acked = []
        for n in range(60):
            status, _, answer = await post(caller, front, batch_body(f"b{n}", []))
            assert status == 200, answer
            acked.append(f"b{n}")
        kept = {batch for (batch,) in await fetch(url, "SELECT batch_id FROM notification")}
        assert kept == set(acked)
        # The log counts the requests that the server has kept waiting.
        tried_twice = re.findall(r"([0-9.:]+, [0-9.:]+) (\d+, \d+)$", front.logs(), re.MULTILINE)
        hung = f"127.0.0.1:{port_of(daemons[0])}"
        assert {(addresses.partition(",")[0], states) for addresses, states in tried_twice} == {(hung, "504, 200")}
        assert len(tried_twice) < len(acked) // 4
        daemons[0].send(signal.SIGCONT)


async def test_the_rest_of_the_server_is_reached_through_nginx_as_without_it(
    tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    async with behind_nginx(tmp_path, await new_schema()) as (front, _):
        bearer = {"Authorization": "Bearer token-of-the-administrator"}
        # A body that is too large is refused by the server, with its own message.
        status, _, answer = await post(
            caller, front, batch_body("large", []).ljust(Config().server.body_limit_bytes + 1)
        )
        assert (status, answer["code"]) == (413, "413")
        async with caller.get(f"{front.url}/api/v1/status") as refused:
            assert refused.status == 401
        async with caller.get(f"{front.url}/api/v1/status", headers=bearer) as told:
            assert (await told.json())["nodes"] == {"callbacks": 2, "probes": 2}
        async with caller.get(f"{front.url}/api/v1/stream", headers=bearer) as stream:
            async with asyncio.timeout(SECONDS):
                assert (await stream.content.readline()).startswith(b"event: ")
        # Logged in at one of them is logged in at both, whichever is asked.
        form = {"token": "token-of-the-administrator"}
        async with caller.post(f"{front.url}/ui/login", data=form, allow_redirects=False) as login:
            cookie = login.cookies["notify_server_session"].value
        for _ in range(4):
            async with caller.get(f"{front.url}/", cookies={"notify_server_session": cookie}) as page:
                assert (page.status, page.url.path) == (200, "/")
