"""Checks the programs that the server uses: Python and its packages, libcurl, SQLite, the clock."""

from __future__ import annotations

import ctypes
import re
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import notify_server
from notify_server.cli.doctor.findings import Finding, ok, problem, warning
from notify_server.store.sqlite.database import OLDEST_SQLITE

# The last SQLite whose WAL mode two writers can corrupt (https://sqlite.org/wal.html, "the WAL-reset bug").
WAL_BUG_UNTIL = (3, 51, 2)


def check_python() -> Iterator[Finding]:
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


def check_libcurl() -> Iterator[Finding]:
    try:
        import pycurl
    except ImportError as error:
        yield problem(
            "libcurl",
            f"cannot be loaded ({error}): no file can be checked",
            "pip install --force-reinstall pycurl",
        )
        return
    info = pycurl.version_info()
    version, features, tls, ares = info[1], info[4], info[5], info[9]
    asynchronous = f"c-ares {ares}" if ares else "threaded"
    resolver = asynchronous if features & pycurl.VERSION_ASYNCHDNS else "blocking"
    remedy = "pip install --force-reinstall pycurl, whose wheel contains libcurl"
    if not features & pycurl.VERSION_SSL:
        yield problem("libcurl", f"libcurl {version} has no TLS: no https address can be checked", remedy)
    if not features & pycurl.VERSION_IPV6:
        yield warning("libcurl", f"libcurl {version} has no IPv6", remedy)
    if resolver == "blocking":
        yield warning(
            "libcurl", f"libcurl {version} looks names up one by one: a slow look-up delays all files", remedy
        )
    ipv6 = "IPv6, " if features & pycurl.VERSION_IPV6 else ""
    yield ok("libcurl", f"libcurl {version}, {tls or 'no TLS'}, {ipv6}resolver {resolver}")


def check_sqlite() -> Iterator[Finding]:
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        needed = ".".join(map(str, OLDEST_SQLITE))
        yield problem("sqlite", f"SQLite {version} is too old", f"use a Python with SQLite {needed} or newer")
        return
    note = ""
    if sqlite3.sqlite_version_info <= WAL_BUG_UNTIL:
        note = (
            f"; up to {'.'.join(map(str, WAL_BUG_UNTIL))} two writers at once can corrupt a database: "
            "the server is one, so let no other program write to the database while it runs"
        )
    yield ok("sqlite", f"SQLite {version}{note}")


def check_clock() -> Iterator[Finding]:
    now = time.time()
    installed = Path(notify_server.__file__).stat().st_mtime
    shown = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    remedy = "set the clock, and keep it set: `timedatectl set-ntp true`, or chrony"
    if now < installed - 86_400:
        yield problem("clock", f"{shown} is before this program was installed", remedy)
        return
    synchronised = _synchronised()
    if synchronised is False:
        yield warning("clock", f"{shown}, not synchronised: signed callbacks are refused when it is off", remedy)
    else:
        yield ok("clock", f"{shown}{', synchronised' if synchronised else ''}")


def _synchronised() -> bool | None:
    """Return whether the kernel regards the clock as synchronised (adjtimex(2)), None if unknown."""
    if struct.calcsize("l") != 8:
        return None
    # struct timex: unsigned int modes (0 changes nothing), four longs, int status. The rest is not read.
    timex = ctypes.create_string_buffer(512)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (AttributeError, OSError):
        return None
    (status,) = struct.unpack_from("=i", timex.raw, 40)
    unsynchronised = 0x40
    return None if state == -1 else not status & unsynchronised
