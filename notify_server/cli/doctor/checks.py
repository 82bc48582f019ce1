"""What `doctor` looks at. Each check yields what it found, and changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import os
import re
import resource
import shutil
import socket
import sqlite3
import ssl
import stat
import struct
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from pydantic import SecretStr

import notify_server
from notify_server.config import Config
from notify_server.processes.prober_client import system_certificates
from notify_server.store.sql import load_migrations, load_queries, unfinished
from notify_server.store.sqlite.database import APPLICATION_ID, BUSY_TIMEOUT_MS, OLDEST_SQLITE, copied_from
from notify_server.verify.guard import Guard

# The last SQLite whose WAL mode two writers can corrupt (https://sqlite.org/wal.html, "the WAL-reset bug").
WAL_BUG_UNTIL = (3, 51, 2)
ASK_SECONDS = 3.0
# Time for SQLite's quick_check, below what a check may take at all.
INTEGRITY_SECONDS = 4.0
MEBIBYTE = 1024**2
MIN_DISK = 64 * MEBIBYTE
DISK_LITTLE = 1024 * MEBIBYTE
WAL_LARGE = 256 * MEBIBYTE
# Of backlog_limit, what is worth a warning.
BACKLOG_SHARE = 0.8
CERTIFICATE_SOON = timedelta(days=14)
# What the daemon has open beside connections: the database, pipes, the event loop's own.
DESCRIPTORS_OWN = 64
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs"}
)
FLEETING_FILESYSTEMS = frozenset({"tmpfs", "ramfs"})


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """What a check found, and how to mend it when that is needed. Each is one line."""

    check: str
    level: Level
    text: str
    mend: str | None = None


def ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, mend: str) -> Finding:
    return Finding(check, Level.WARNING, text, mend)


def problem(check: str, text: str, mend: str) -> Finding:
    return Finding(check, Level.PROBLEM, text, mend)


@dataclass(frozen=True)
class Subject:
    """What is looked at: the configuration, the file it came from, and a host whose name is to resolve."""

    config: Config
    file: Path | None
    host: str | None


Check = Callable[[], Iterable[Finding]]


def first_checks() -> dict[str, Check]:
    """The checks that need no configuration, by name."""
    return {"python": _python, "libcurl": _libcurl, "sqlite": _sqlite, "clock": _clock}


def configured_checks(subject: Subject) -> dict[str, Check]:
    """The checks of what is configured, by name."""
    checks = {
        "listen": _listen,
        "certificate": _certificate,
        "secrets": _secrets,
        "exposure": _exposure,
        "dns": _dns,
        "trust": _trust,
        "descriptors": _descriptors,
    }
    if subject.config.store.is_postgres:
        # Its driver is loaded by those who use it.
        from notify_server.cli.doctor import postgres as postgres_checks

        checks["database"] = postgres_checks.look
    else:
        checks |= {"directory": _directory, "disk": _disk, "daemon": _daemon, "database": _database}
    return {name: partial(check, subject) for name, check in checks.items()}


# --- The programs that it stands on ---


def _python() -> Iterator[Finding]:
    found, missing = [], []
    for requirement in metadata.requires("notify-server") or []:
        if "extra ==" not in requirement:
            name = re.split(r"[\[><=~!; ]", requirement)[0]
            try:
                found.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                missing.append(requirement)
    if missing:
        yield problem("python", f"missing: {', '.join(missing)}", "pip install notify-server again")
    yield ok("python", f"Python {sys.version.split()[0]}; {', '.join(found)}")


def _libcurl() -> Iterator[Finding]:
    try:
        import pycurl
    except ImportError as error:
        yield problem(
            "libcurl",
            f"cannot be loaded ({error}): no file can be asked for",
            "pip install --force-reinstall pycurl",
        )
        return
    info = pycurl.version_info()
    version, features, tls, ares = info[1], info[4], info[5], info[9]
    asynchronous = f"c-ares {ares}" if ares else "threaded"
    resolver = asynchronous if features & pycurl.VERSION_ASYNCHDNS else "blocking"
    mend = "pip install --force-reinstall pycurl, which brings a libcurl of its own"
    if not features & pycurl.VERSION_SSL:
        yield problem("libcurl", f"libcurl {version} has no TLS: no https address can be asked for", mend)
    if not features & pycurl.VERSION_IPV6:
        yield warning("libcurl", f"libcurl {version} has no IPv6", mend)
    if resolver == "blocking":
        yield warning("libcurl", f"libcurl {version} looks names up one by one: a slow look-up delays all files", mend)
    ipv6 = "IPv6, " if features & pycurl.VERSION_IPV6 else ""
    yield ok("libcurl", f"libcurl {version}, {tls or 'no TLS'}, {ipv6}resolver {resolver}")


def _sqlite() -> Iterator[Finding]:
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        needed = ".".join(map(str, OLDEST_SQLITE))
        yield problem("sqlite", f"SQLite {version} is too old", f"use a Python with SQLite {needed} or newer")
        return
    note = ""
    if sqlite3.sqlite_version_info <= WAL_BUG_UNTIL:
        note = (
            f"; up to {'.'.join(map(str, WAL_BUG_UNTIL))} two writers at once can corrupt a database: "
            "the daemon is one, write nothing into the record while it runs"
        )
    yield ok("sqlite", f"SQLite {version}{note}")


def _clock() -> Iterator[Finding]:
    now = time.time()
    installed = Path(notify_server.__file__).stat().st_mtime
    shown = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    mend = "set the clock, and keep it set: `timedatectl set-ntp true`, or chrony"
    if now < installed - 86_400:
        yield problem("clock", f"{shown} is before this program was installed", mend)
        return
    synchronised = _synchronised()
    if synchronised is False:
        yield warning("clock", f"{shown}, not synchronised: signed callbacks are refused when it is off", mend)
    else:
        yield ok("clock", f"{shown}{', synchronised' if synchronised else ''}")


def _synchronised() -> bool | None:
    """Whether the kernel takes the clock for synchronised (adjtimex(2)); None when it cannot be told."""
    if struct.calcsize("l") != 8:
        return None
    # struct timex: unsigned int modes (0 changes nothing), four longs, int status. The rest is not looked at.
    timex = ctypes.create_string_buffer(512)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (AttributeError, OSError):
        return None
    (status,) = struct.unpack_from("=i", timex.raw, 40)
    unsynchronised = 0x40
    return None if state == -1 else not status & unsynchronised


# --- The endpoint ---


def _listen(subject: Subject) -> Iterator[Finding]:
    server = subject.config.server
    if server.port == 0:
        yield ok("listen", f"{server.host}, any free port")
        return
    place = f"{server.host}:{server.port}"
    mend = "free the port, or set [server] host and port"
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)  # noqa: S104
    try:
        answer = _ask_healthz(local, server.port, tls=server.ssl_certificate is not None)
    except ConnectionRefusedError:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            yield problem("listen", f"{place} cannot be listened on ({error.strerror or error})", mend)
        else:
            yield ok("listen", f"{place} is free")
    except (OSError, http.client.HTTPException) as error:
        text = f"{place}: what listens there does not answer ({getattr(error, 'strerror', None) or error})"
        yield problem("listen", text, f"if it is a notify_server, look at its log; else {mend}")
    else:
        if answer == (200, b"ok\n"):
            yield ok("listen", f"{place}: a notify_server runs there, and answers /healthz")
        else:
            yield problem("listen", f"{place} is in use by another program", mend)


def _ask_healthz(host: str, port: int, *, tls: bool) -> tuple[int, bytes]:
    if tls:
        # Nothing is told to it, and nothing believed: whose certificate it is makes no difference.
        context = ssl._create_unverified_context()  # noqa: S323
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=ASK_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=ASK_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        return response.status, response.read(64)


def _certificate(subject: Subject) -> Iterator[Finding]:
    server = subject.config.server
    if server.ssl_certificate is None:
        return
    try:
        # With a password, since OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.ssl_certificate, server.ssl_key, password="")
        leaf = x509.load_pem_x509_certificates(server.ssl_certificate.read_bytes())[0]
    except (OSError, ValueError) as error:
        yield problem(
            "certificate",
            f"{server.ssl_certificate} and {server.ssl_key} cannot be used ({error})",
            "set a certificate in PEM and the key that belongs to it, which has no password",
        )
        return
    now, until = datetime.now(UTC), leaf.not_valid_after_utc
    mend = "renew it, and restart the server"
    if now > until:
        yield problem("certificate", f"{server.ssl_certificate}: expired on {until:%Y-%m-%d}", mend)
    elif now < (since := leaf.not_valid_before_utc):
        yield problem("certificate", f"{server.ssl_certificate}: not valid before {since:%Y-%m-%d}", "check the clock")
    elif until - now < CERTIFICATE_SOON:
        yield warning("certificate", f"{server.ssl_certificate}: expires on {until:%Y-%m-%d}", mend)
    else:
        yield ok("certificate", f"{server.ssl_certificate}: valid until {until:%Y-%m-%d}")


def _secrets(subject: Subject) -> Iterator[Finding]:
    auth, server = subject.config.auth, subject.config.server
    secret = [] if server.ssl_key is None else [server.ssl_key]
    if subject.file is not None:
        written = tomllib.loads(subject.file.read_bytes().decode("utf-8-sig"))
        keys = written.get("auth", {}).keys() & {name for name, value in auth if isinstance(value, SecretStr)}
        if keys or _has_password(written.get("store", {}).get("url", "")):
            secret.append(subject.file)
    open_to_all = [path for path in secret if path.stat().st_mode & stat.S_IROTH]
    for path in open_to_all:
        yield problem(
            "secrets",
            f"{path} holds secrets, and every user of this machine can read it",
            f"chmod o-r {path}",
        )
    if not open_to_all:
        yield ok("secrets", "no file with secrets can be read by every user")


def _has_password(url: str) -> bool:
    parts = urlsplit(url)
    return parts.password is not None or "password" in parse_qs(parts.query)


def _exposure(subject: Subject) -> Iterator[Finding]:
    auth, host = subject.config.auth, subject.config.server.host
    if not subject.config.server.takes_callbacks:
        yield ok("exposure", f"listens on {host}, and takes no callbacks")
        return
    protected = [
        name
        for name, there in (
            ("callback_token", auth.callback_token),
            ("callback_networks", auth.callback_networks),
            ("signature", auth.signature == "required"),
        )
        if there
    ]
    try:
        loopback = ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if protected or loopback:
        yield ok("exposure", f"listens on {host}, protected by {', '.join(protected) or 'loopback'}")
    else:
        yield warning(
            "exposure",
            f"listens on {host}: anyone who reaches it can post notifications",
            'set [auth] callback_token, callback_networks, or signature = "required"',
        )


# --- What asking needs ---


def _dns(subject: Subject) -> Iterator[Finding]:
    verify = subject.config.verify
    mend = "name a working resolver in /etc/resolv.conf"
    try:
        servers = re.findall(r"^\s*nameserver\s+(\S+)", Path("/etc/resolv.conf").read_text("utf-8", "replace"), re.M)
    except OSError as error:
        yield warning("dns", f"/etc/resolv.conf cannot be read ({error.strerror})", mend)
    else:
        if servers:
            yield ok("dns", f"name servers: {', '.join(servers)}")
        else:
            yield warning("dns", "/etc/resolv.conf names no name server", mend)
    guard = Guard([], verify.allowed_networks, [])
    hosts = [subject.host] if subject.host else [host for host in verify.allowed_hosts if not host.startswith("*")]
    for host in hosts:
        try:
            addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            yield problem("dns", f"{host} does not resolve ({reason})", f"check the name, or {mend}")
            continue
        refused = sorted(address for address in addresses if guard.check_address(address, 443) is not None)
        if refused:
            yield warning(
                "dns",
                f"{host} is {', '.join(refused)}, which is not public and never asked",
                "if that is your own store, set [verify] allowed_networks",
            )
        else:
            yield ok("dns", f"{host} is {', '.join(sorted(addresses))}")


def _trust(subject: Subject) -> Iterator[Finding]:
    path = str(subject.config.verify.ca_file or system_certificates())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    number, why = 0, "it holds no certificate authority"
    try:
        context.load_verify_locations(path)
        number = context.cert_store_stats()["x509_ca"]
    except OSError as error:
        why = str(error)
    if number:
        yield ok("trust", f"{path}: {number} certificate authorities")
    else:
        yield problem(
            "trust",
            f"{path} cannot be used ({why}): every https address fails with tls_error",
            "install ca-certificates, or set [verify] ca_file to certificates in PEM",
        )


def _descriptors(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    needed = config.server.max_connections + config.verify.concurrency + DESCRIPTORS_OWN
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    whose = "here"
    holder = None if config.store.is_postgres else _holder(config.store.path)
    with contextlib.suppress(OSError, ValueError, TypeError):
        limits = Path(f"/proc/{int(holder or '')}/limits").read_text()
        limit, whose = int(re.findall(r"^Max open files\s+(\d+)", limits, re.M)[0]), f"in process {holder}"
    text = f"{limit:,} {whose}, {needed:,} wanted for max_connections and concurrency"
    if limit == resource.RLIM_INFINITY or limit >= needed:
        yield ok("descriptors", text)
    else:
        yield warning(
            "descriptors",
            text,
            f"`ulimit -n {needed}`, LimitNOFILE={needed} for systemd, or a lower [server] max_connections",
        )


# --- The record ---


def _nearest(path: Path) -> Path:
    """The path, or of what it lies in the nearest that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _directory(subject: Subject) -> Iterator[Finding]:
    path = subject.config.store.path
    directory = _nearest(path.parent)
    whom = f"user {os.geteuid()}"
    if not directory.is_dir() or not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        yield problem(
            "directory",
            f"{directory}: {whom} cannot write there",
            f"chown or chmod {directory}, run doctor as the daemon's user, or set [store] url",
        )
        return
    for file in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", ".lock"))):
        if file.exists() and not os.access(file, os.R_OK | os.W_OK, effective_ids=True):
            yield problem("directory", f"{file}: {whom} cannot write it", f"chown or chmod {file}")
            return
    made = "" if directory == path.parent.absolute() else ", the rest will be made"
    yield ok("directory", f"{directory}: {whom} can write there{made}")


def _disk(subject: Subject) -> Iterator[Finding]:
    directory = _nearest(subject.config.store.path.parent).resolve()
    kind, options = filesystem(directory, Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape"))
    usage, inodes = shutil.disk_usage(directory), os.statvfs(directory)
    text = f"{directory}: {_size(usage.free)} free, filesystem {kind}"
    elsewhere = "set [store] url to a path on a local disk"
    space = "free space, or set [store] url to a larger disk"
    if kind in NETWORK_FILESYSTEMS:
        yield problem("disk", f"{text}: SQLite's locks do not hold on a network filesystem", elsewhere)
    elif "ro" in options:
        yield problem("disk", f"{text}: mounted read-only", "mount it for writing, or " + elsewhere)
    elif usage.free < MIN_DISK or (inodes.f_files and not inodes.f_favail):
        yield problem("disk", f"{text}: callbacks will be answered 503", space)
    elif usage.free < DISK_LITTLE:
        yield warning("disk", f"{text}: a file takes up to 1 kB, its batch's body included", space)
    elif kind in FLEETING_FILESYSTEMS:
        yield warning("disk", f"{text}: lost when the machine restarts", elsewhere)
    else:
        yield ok("disk", text)


def filesystem(path: Path, mounts: str) -> tuple[str, list[str]]:
    """The kind of filesystem that a path is on, and its mount options, from the text of proc_pid_mountinfo(5)."""
    best, found = -1, ("unknown", [""])
    for line in mounts.splitlines():
        mounted, _, what = line.partition(" - ")
        fields = mounted.split(" ")
        # Blanks in it are octal.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        # What is mounted later hides what was there before.
        if path.is_relative_to(point) and len(point) >= best:
            best, found = len(point), (what.split(" ")[0], fields[5].split(","))
    return found


def _holder(database: Path) -> str | None:
    """The process that holds the record, None when none does."""
    actual = database.resolve()
    try:
        descriptor = os.open(actual.with_name(actual.name + ".lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
    finally:
        os.close(descriptor)
    return None


def _daemon(subject: Subject) -> Iterator[Finding]:
    path = subject.config.store.path
    holder = _holder(path)
    yield ok("daemon", f"process {holder} has {path}" if holder else f"no daemon has {path}")


def _database(subject: Subject) -> Iterator[Finding]:
    path = subject.config.store.path
    if not path.exists():
        yield ok("database", f"{path} is not there yet, the daemon makes it")
        return
    wal = path.with_name(path.name + "-wal")
    wal_bytes = wal.stat().st_size if wal.exists() else 0
    # At rest it is read as a plain file: SQLite would leave a -shm beside it.
    at_rest = "&immutable=1" if not wal_bytes and _holder(path) is None else ""
    deadline = time.monotonic() + INTEGRITY_SECONDS
    broken = f'restore a backup, or save what can be read with `sqlite3 {path} ".recover"`'
    try:
        with contextlib.closing(
            sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro{at_rest}",
                uri=True,
                timeout=BUSY_TIMEOUT_MS / 1000,
                isolation_level=None,
            )
        ) as connection:
            yield from _schema(connection, path)
            yield from _backlog(connection, subject.config.verify.backlog_limit)
            connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            answer = "; ".join(str(row[0]) for row in connection.execute("PRAGMA quick_check(3)"))
        if answer == "ok":
            yield ok("database", f"{path}: quick_check finds nothing wrong")
        else:
            yield problem("database", f"{path}: is damaged ({answer})", broken)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
            text = f"{path}: too large to be checked in {INTEGRITY_SECONDS:g} seconds"
            yield ok("database", f'{text}; `sqlite3 {path} "PRAGMA quick_check"` takes its time')
        else:
            yield problem("database", f"{path}: cannot be read ({error})", broken)
    text = f"{wal}: {_size(wal_bytes)}"
    if wal_bytes > WAL_LARGE:
        yield warning("wal", text, "look for a program that keeps a query on the record open")
    else:
        yield ok("wal", text)


def _schema(connection: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    known = len(load_migrations("sqlite"))
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID:
        yield problem("schema", f"{path} is not a record of notify_server", "name another file in [store] url")
    elif (source := copied_from(connection)) is not None:
        text, _, mend = str(unfinished(str(path), source)).rpartition(": ")
        yield problem("schema", text, mend)
    else:
        yield schema_finding(version, known)


def schema_finding(version: int, known: int) -> Finding:
    """What is to be said of a schema of this version, by a program that knows as many."""
    if version > known:
        return problem(
            "schema",
            f"version {version}, this program knows {known}",
            "run the newer notify_server that wrote it, or restore a backup from before the upgrade",
        )
    if version < known:
        return warning("schema", f"version {version} of {known}", "`notify-server migrate`, or start the daemon")
    return ok("schema", f"version {version}, the latest")


def _backlog(connection: sqlite3.Connection, limit: int) -> Iterator[Finding]:
    sql = load_queries("sqlite")
    try:
        (expanded,) = connection.execute(sql["inbox_start"]).fetchone()
        (in_inbox,) = connection.execute(sql["inbox_files"], (expanded,)).fetchone()
        (pending,) = connection.execute(sql["backlog"]).fetchone()
    except sqlite3.OperationalError:
        return  # Another schema, which has been told.
    yield backlog_finding(in_inbox + pending, limit)


def backlog_finding(backlog: int, limit: int) -> Finding:
    """What is to be said of so many files that wait."""
    text = f"{backlog:,} files wait, of {limit:,} that may"
    if backlog >= limit:
        return problem(
            "backlog",
            f"{text}: callbacks are answered 503",
            "start the daemon, or raise [verify] concurrency or backlog_limit",
        )
    if backlog >= BACKLOG_SHARE * limit:
        return warning("backlog", text, "raise [verify] concurrency or backlog_limit")
    return ok("backlog", text)


def _size(size: int) -> str:
    return f"{size / 1024**3:,.1f} GiB" if size >= 1024**3 else f"{size / MEBIBYTE:,.1f} MiB"
