"""`doctor`, as a user runs it: beside a daemon, without one, and on installations with something wrong."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import sqlite3
import ssl
import stat
from collections.abc import Iterable, Mapping
from email.utils import formatdate
from pathlib import Path
from time import time
from typing import Any, NamedTuple

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from notify_server.cli.doctor import record
from notify_server.cli.doctor import run as doctor
from notify_server.cli.doctor.findings import Finding, Level
from notify_server.store.sqlite.database import connect
from tests.support.cli import on_terminal
from tests.support.daemon import Daemon, clean_environment, run_command, to_toml
from tests.support.origin import SILENCE, Answer, Origin
from tests.support.waiting import free_port

BEFORE_ALL = {"configuration", "python", "libcurl", "sqlite", "clock"}


class Seen(NamedTuple):
    code: int
    findings: dict[str, list[Finding]]

    def worst(self, check: str) -> Finding:
        """The worst of what a check found."""
        return max(self.findings[check], key=lambda finding: list(Level).index(finding.level))


async def run_doctor(folder: Path, **variables: str) -> Seen:
    """What the command says as a process of its own."""
    end = await run_command("doctor", "--json", cwd=folder, environ=clean_environment(**variables))
    assert end.stderr == ""
    told: dict[str, Any] = json.loads(end.stdout)
    seen = sort(Finding(**(entry | {"level": Level(entry["level"])})) for entry in told["findings"])
    problems = sum(finding.level is Level.PROBLEM for each in seen.values() for finding in each)
    assert (told["problems"], end.code) == (problems, int(problems > 0))
    return Seen(end.code, seen)


async def examine(folder: Path, host: str | None = None) -> Seen:
    """The same without the process, which takes longer to start than to look."""
    found = await asyncio.to_thread(doctor.examine, folder / "config.toml", host)
    return Seen(int(any(finding.level is Level.PROBLEM for finding in found)), sort(found))


def sort(found: Iterable[Finding]) -> dict[str, list[Finding]]:
    findings: dict[str, list[Finding]] = {}
    for finding in found:
        # Whoever reads it can do something about it.
        assert finding.level is Level.OK or finding.remedy, finding
        findings.setdefault(finding.check, []).append(finding)
    return findings


def configure(folder: Path, **sections: Any) -> Path:
    """A configuration in `folder`, on any port unless one is given; the database's path."""
    base: dict[str, Any] = {"server": {"port": 0}, "store": {"url": f"sqlite:///{folder}/notify.db"}}
    for section, keys in sections.items():
        base[section] = base.get(section, {}) | dict(keys) if isinstance(keys, Mapping) else keys
    (folder / "config.toml").write_text(to_toml(base))
    return folder / "notify.db"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


async def test_a_sound_installation_has_no_problem_and_nothing_is_changed(tmp_path: Path) -> None:
    configure(tmp_path)
    connect(tmp_path / "notify.db").close()
    before = snapshot(tmp_path)
    seen = await run_doctor(tmp_path)
    assert seen.code == 0
    assert seen.findings.keys() == BEFORE_ALL | {
        "listen", "secrets", "exposure", "dns", "trust", "descriptors", "directory", "disk", "daemon", "database",
        "schema", "backlog", "wal",
    }  # fmt: skip
    for check in ("python", "libcurl", "sqlite", "listen", "secrets", "exposure", "directory", "daemon", "database"):
        assert seen.worst(check).level is Level.OK, check
    assert "aiohttp 3." in seen.worst("python").text
    assert "IPv6" in seen.worst("libcurl").text and "SSL" in seen.worst("libcurl").text
    assert sqlite3.sqlite_version in seen.worst("sqlite").text
    assert snapshot(tmp_path) == before


async def test_nothing_is_made_where_there_is_nothing_yet(tmp_path: Path) -> None:
    seen = await run_doctor(tmp_path, NOTIFY_SERVER__SERVER__PORT="0")
    assert seen.code == 0
    assert "the rest will be made" in seen.worst("directory").text
    assert "does not exist yet" in seen.worst("database").text
    assert list(tmp_path.iterdir()) == []


async def test_beside_a_daemon_it_says_so_and_the_daemon_goes_on(tmp_path: Path) -> None:
    async with Daemon(tmp_path, {"server": {"port": free_port()}}) as daemon, Origin() as origin:
        origin.default = SILENCE
        await daemon.deliver("b", [origin.url(f"/{number}") for number in range(7)])
        await origin.reached(7)
        seen = await examine(tmp_path)
        assert seen.code == 0
        assert "a notify_server runs there, and answers /healthz" in seen.worst("listen").text
        assert f"process {daemon.pid} has " in seen.worst("daemon").text
        assert f"in process {daemon.pid}" in seen.worst("descriptors").text
        assert seen.worst("backlog").text.startswith("7 files wait")
        assert seen.worst("database").level is Level.OK
        origin.default = Answer()
        await daemon.settle("b2", [origin.url("/x")])


async def test_a_daemon_with_a_certificate_is_asked_over_tls(tmp_path: Path) -> None:
    server = {"port": free_port(), **certificate(tmp_path)}
    async with Daemon(tmp_path / "daemon", {"server": server}) as daemon:
        seen = await examine(daemon.folder)
    assert "answers /healthz" in seen.worst("listen").text
    assert seen.worst("certificate").level is Level.OK


def certificate(folder: Path, *, days: int = 100) -> dict[str, str]:
    """Make a pair that is valid for so many days; the keys of `[server]`."""
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    pair = trustme.CA().issue_cert("localhost", not_after=until)
    pair.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    pair.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.key").chmod(0o600)
    return {"ssl_certificate": str(folder / "tls.crt"), "ssl_key": str(folder / "tls.key")}


@pytest.mark.parametrize("silent", [False, True])
async def test_a_port_that_another_program_has_is_a_problem(tmp_path: Path, silent: bool) -> None:
    async with Origin() as origin:
        origin.default = SILENCE if silent else Answer(404)
        configure(tmp_path, server={"port": origin.port})
        seen = await examine(tmp_path)
    assert seen.worst("listen").level is Level.PROBLEM
    assert ("does not answer" if silent else "in use by another program") in seen.worst("listen").text


async def test_an_address_that_this_machine_has_not_is_a_problem(tmp_path: Path) -> None:
    configure(tmp_path, server={"host": "192.0.2.1", "port": 8080}, auth={"callback_networks": ["192.0.2.0/24"]})
    assert (await examine(tmp_path)).worst("listen").level is Level.PROBLEM


async def test_a_wrong_configuration_is_reported_and_the_other_checks_still_run(tmp_path: Path) -> None:
    configure(tmp_path, server={"port": 99999}, verify={"timout": 1})
    seen = await run_doctor(tmp_path)
    assert seen.findings.keys() == BEFORE_ALL
    assert [finding.text for finding in seen.findings["configuration"]] == [
        "[server] port: must be from 0 to 65535, not 99999",
        '[verify] timout: unknown key, did you mean "timeout"?',
    ]


@pytest.mark.parametrize(
    ("days", "level", "text"),
    [(100, Level.OK, "valid until"), (3, Level.WARNING, "expires"), (-3, Level.PROBLEM, "expired")],
)
async def test_a_certificate_is_reported_before_it_expires(tmp_path: Path, days: int, level: Level, text: str) -> None:
    configure(tmp_path, server=certificate(tmp_path, days=days))
    found = (await examine(tmp_path)).worst("certificate")
    assert found.level is level
    assert text in found.text


async def test_a_key_that_does_not_belong_to_the_certificate_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other")
    configure(tmp_path, server=certificate(tmp_path) | {"ssl_key": other["ssl_key"]})
    assert "cannot be used" in (await examine(tmp_path)).worst("certificate").text


async def test_a_key_with_a_password_is_a_problem_and_no_password_is_prompted_for(tmp_path: Path) -> None:
    configure(tmp_path, server=certificate(tmp_path))
    key = serialization.load_pem_private_key((tmp_path / "tls.key").read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"sesame")
    (tmp_path / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    )
    code, text = await on_terminal("doctor", cwd=tmp_path)
    assert code == 1
    assert "tls.key cannot be used" in text
    assert "pass phrase" not in text


async def test_a_token_or_key_that_everybody_can_read_is_a_problem(tmp_path: Path) -> None:
    configure(tmp_path, server=certificate(tmp_path), auth={"callback_token": "a-long-secret"})
    files = [tmp_path / "config.toml", tmp_path / "tls.key"]
    for path in files:
        path.chmod(0o644)
    seen = await examine(tmp_path)
    told = {finding.remedy for finding in seen.findings["secrets"]}
    assert told == {f"chmod o-r {tmp_path / 'config.toml'}", f"chmod o-r {tmp_path / 'tls.key'}"}
    for path in files:
        path.chmod(path.stat().st_mode & ~stat.S_IROTH)
    assert (await examine(tmp_path)).worst("secrets").level is Level.OK


async def test_a_public_address_without_protection_is_a_warning(tmp_path: Path) -> None:
    configure(tmp_path, server={"host": "0.0.0.0"})
    assert (await examine(tmp_path)).worst("exposure").level is Level.WARNING
    found = (await run_doctor(tmp_path, NOTIFY_SERVER__AUTH__CALLBACK_TOKEN="a-long-secret")).worst("exposure")
    assert (found.level, found.text) == (Level.OK, "listens on 0.0.0.0, protected by callback_token")
    nobody = {"NOTIFY_SERVER__SERVER__ROLES": "probes", "NOTIFY_SERVER__STORE__URL": "postgresql://127.0.0.1:1/d"}
    found = (await run_doctor(tmp_path, **nobody)).worst("exposure")
    assert (found.level, found.text) == (Level.OK, "listens on 0.0.0.0, and takes no callbacks")


async def test_names_are_resolved_and_private_addresses_reported(tmp_path: Path) -> None:
    configure(tmp_path, verify={"allowed_hosts": ["localhost", "*.example.com"]})
    assert "127.0.0.1" in (await examine(tmp_path)).worst("dns").text
    missing = (await examine(tmp_path, "no-such-host.invalid")).worst("dns")
    assert missing.level is Level.PROBLEM
    assert missing.text.startswith("no-such-host.invalid does not resolve")
    configure(tmp_path, verify={"allowed_hosts": ["localhost"], "allowed_networks": ["127.0.0.0/8", "::1"]})
    assert all(f.level is Level.OK for f in (await examine(tmp_path)).findings["dns"] if "localhost" in f.text)


async def test_certificates_that_are_none_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    configure(tmp_path, verify={"ca_file": str(tmp_path / "ca.pem")})
    assert (await examine(tmp_path)).worst("trust").level is Level.PROBLEM
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    found = (await examine(tmp_path)).worst("trust")
    assert (found.level, found.text) == (Level.OK, f"{tmp_path / 'ca.pem'}: 1 certificate authorities")


async def test_too_few_descriptors_are_a_warning(tmp_path: Path) -> None:
    configure(tmp_path, server={"max_connections": 2_000_000_000})
    found = (await examine(tmp_path)).worst("descriptors")
    assert found.level is Level.WARNING
    assert found.remedy and found.remedy.startswith("`ulimit -n 2000000192`")


@pytest.mark.parametrize("harm", ["not a database", "another program's", "a page overwritten"])
async def test_a_damaged_or_foreign_database_is_a_problem(tmp_path: Path, harm: str) -> None:
    database = configure(tmp_path)
    if harm == "not a database":
        database.write_bytes(b"what is this " * 500)
    elif harm == "another program's":
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("CREATE TABLE theirs (x)")
    else:
        connect(database).close()
        content = bytearray(database.read_bytes())
        content[4096 * 2 : 4096 * 3] = os.urandom(4096)
        database.write_bytes(content)
    before = database.read_bytes()
    seen = await examine(tmp_path)
    assert Level.PROBLEM in {seen.worst(check).level for check in ("database", "schema") if check in seen.findings}
    assert database.read_bytes() == before


@pytest.mark.parametrize(("version", "level"), [(999, Level.PROBLEM), (0, Level.WARNING)])
async def test_another_schema_is_reported(tmp_path: Path, version: int, level: Level) -> None:
    database = configure(tmp_path)
    connect(database).close()
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    assert (await examine(tmp_path)).worst("schema").level is level


@pytest.mark.parametrize(("limit", "level"), [(10, Level.PROBLEM), (12, Level.WARNING), (100, Level.OK)])
async def test_a_full_backlog_is_reported(tmp_path: Path, limit: int, level: Level) -> None:
    database = configure(tmp_path, verify={"backlog_limit": limit})
    connection = connect(database)
    connection.execute(
        "INSERT INTO notification (batch_id, api_code, body, files, received_at, remote_addr, signature, request_id) "
        "VALUES ('b', 'c', '{}', 10, 0, '127.0.0.1', 'none', 'r')"
    )
    connection.close()
    assert (await examine(tmp_path)).worst("backlog").level is level


async def test_what_a_killed_daemon_left_is_read(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.deliver("b", [])
        await daemon.verdict("b")
        await daemon.kill()
    assert (tmp_path / "notify.db-wal").stat().st_size > 0
    before = (tmp_path / "notify.db-wal").read_bytes()
    seen = await examine(tmp_path)
    assert seen.code == 0
    assert "no server" in seen.worst("daemon").text
    assert seen.worst("database").level is Level.OK
    assert (tmp_path / "notify.db-wal").read_bytes() == before


async def test_a_directory_that_cannot_be_had_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    configure(tmp_path, store={"url": f"sqlite:///{tmp_path}/file/notify.db"})
    assert (await examine(tmp_path)).worst("directory").level is Level.PROBLEM


@pytest.mark.parametrize(
    ("line", "path", "kind", "options"),
    [
        ("36 35 98:0 / /srv rw,noatime shared:1 - nfs4 host:/ rw", "/srv/data", "nfs4", ["rw", "noatime"]),
        ("36 35 98:0 / /srv/my\\040disk ro - ext4 /dev/sda1 rw", "/srv/my disk/x", "ext4", ["ro"]),
        ("36 35 98:0 / /srvx rw - nfs host:/ rw", "/srv/data", "overlay", ["rw"]),
    ],
)
def test_the_filesystem_is_that_of_the_innermost_mount(line: str, path: str, kind: str, options: list[str]) -> None:
    mounts = f"20 1 0:30 / / rw - overlay overlay rw\n{line}\n21 20 0:5 / /proc rw - proc proc rw\n"
    assert record.filesystem(Path(path), mounts) == (kind, options)


def test_a_check_that_hangs_or_breaks_does_not_keep_the_others() -> None:
    reading, writing = os.pipe()

    def hangs() -> list[Finding]:
        os.read(reading, 1)
        return []

    def breaks() -> list[Finding]:
        raise RuntimeError("no")

    def works() -> list[Finding]:
        return [Finding("works", Level.OK, "fine")]

    found = doctor.look({"hangs": hangs, "breaks": breaks, "works": works}, 0.2)
    os.close(writing)
    assert [(finding.check, finding.level) for finding in found] == [
        ("hangs", Level.WARNING),
        ("breaks", Level.WARNING),
        ("works", Level.OK),
    ]
    assert "within 0.2 seconds" in found[0].text
    assert "RuntimeError: no" in found[1].text


async def test_a_terminal_shows_each_check_on_a_line_and_its_remedy_on_the_next(tmp_path: Path) -> None:
    configure(tmp_path, server={"host": "0.0.0.0"})
    code, text = await on_terminal("doctor", cwd=tmp_path, columns=60)
    assert code == 0
    lines = text.replace("\x1b", "").splitlines()
    at = next(index for index, line in enumerate(lines) if "exposure" in line)
    assert "warning" in lines[at]
    assert '-> set [auth] callback_token, callback_networks, or signature = "required"' in lines[at + 1]
    assert "0 problems, " in lines[-1]


# Forwarding


async def test_endpoints_are_checked_for_name_address_tls_and_clock(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(server)
    script = tmp_path / "on-verdict"
    script.touch(0o755)

    def date(seconds: float) -> Answer:
        return Answer(headers={"Date": formatdate(time() + seconds, usegmt=True)})

    async with Origin(tls=server) as secure, Origin() as plain, Origin() as slow, Origin() as wrong:
        secure.default, plain.default = date(0), Answer()
        slow.default, wrong.default = date(-120), date(3600)
        common = {"allowed_networks": ["127.0.0.0/8"]}
        configure(tmp_path, forward=[
            {"name": "trusted", "url": secure.url("/hook?token=hush-hush"), "ca_file": f"{tmp_path}/ca.pem"} | common,
            {"name": "untrusted", "url": secure.url("/hook")} | common,
            {"name": "plain", "url": plain.url("/hook")} | common,
            {"name": "slow", "url": slow.url("/hook")} | common,
            {"name": "wrong", "url": wrong.url("/hook")} | common,
            {"name": "private", "url": plain.url("/hook")},
            {"name": "closed", "url": f"http://127.0.0.1:{free_port()}/hook"} | common,
            {"name": "unknown", "url": "http://no-such-host.invalid/hook"},
            {"name": "script", "command": [str(script)]},
            {"name": "no-script", "command": ["/no/such/program"]},
        ])  # fmt: skip
        findings = {each.text.partition(":")[0]: each for each in (await examine(tmp_path)).findings["forward"]}
        assert [len(each.hits) for each in (secure, plain, slow, wrong)] == [1, 1, 1, 1]
        assert {hit.method for hit in secure.hits + plain.hits} == {"HEAD"}
    assert not any("hush-hush" in str(finding) for finding in findings.values())
    assert {name: finding.level for name, finding in findings.items()} == {
        "trusted": Level.OK, "untrusted": Level.PROBLEM, "plain": Level.OK, "slow": Level.WARNING,
        "wrong": Level.PROBLEM, "private": Level.PROBLEM, "closed": Level.PROBLEM, "unknown": Level.PROBLEM,
        "script": Level.OK, "no-script": Level.PROBLEM,
    }  # fmt: skip
    for name, words in (
        ("trusted", "TLSv1.3); its clock agrees"),
        ("untrusted", "is not trusted"),
        ("plain", "no TLS"),
        ("slow", "ahead of its clock"),
        ("wrong", "behind its clock"),
        ("private", "is 127.0.0.1, which is not public and never contacted"),
        ("closed", "cannot be reached"),
        ("unknown", "does not resolve"),
    ):
        assert words in findings[name].text, findings[name]
    assert findings["private"].remedy == "if it is yours, set [[forward]] private allowed_networks"
