"""Checks a record on SQLite: its directory, its disk, the process that has it open, its content."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from notify_server.cli.doctor.findings import (
    MEBIBYTE,
    Finding,
    Subject,
    backlog_finding,
    in_mebibytes,
    ok,
    problem,
    schema_finding,
    warning,
)
from notify_server.cli.servers import running_servers
from notify_server.config import Config
from notify_server.store.admin_token import token_file
from notify_server.store.sql import load_migrations, load_queries, unfinished
from notify_server.store.sqlite.database import APPLICATION_ID, BUSY_TIMEOUT_MS, copied_from
from notify_server.store.sqlite.lock import holder

# Time for SQLite's quick_check, less than CHECK_SECONDS.
INTEGRITY_SECONDS = 4.0
MIN_DISK = 64 * MEBIBYTE
DISK_LITTLE = 1024 * MEBIBYTE
WAL_LARGE = 256 * MEBIBYTE
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs"}
)
FLEETING_FILESYSTEMS = frozenset({"tmpfs", "ramfs"})


def _nearest(path: Path) -> Path:
    """Return the path, or its nearest ancestor that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def check_directory(subject: Subject) -> Iterator[Finding]:
    path = subject.config.store.path
    directory = _nearest(path.parent)
    whom = f"user {os.geteuid()}"
    if not directory.is_dir() or not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        yield problem(
            "directory",
            f"{directory}: {whom} cannot write there",
            f"chown or chmod {directory}, run doctor as the server's user, or set [store] url",
        )
        return
    files = (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", ".lock")), token_file(path))
    for file in files:
        if file.exists() and not os.access(file, os.R_OK | os.W_OK, effective_ids=True):
            yield problem("directory", f"{file}: {whom} cannot write it", f"chown or chmod {file}")
            return
    if exposed := [str(file) for file in files if file.exists() and file.stat().st_mode & 0o077]:
        yield warning(
            "directory",
            f"{path}: other users of this machine can read the record, or lock it and so stop callbacks",
            f"chmod 600 {' '.join(exposed)}",
        )
        return
    made = "" if directory == path.parent.absolute() else ", the rest will be made"
    yield ok("directory", f"{directory}: {whom} can write there{made}")


def check_disk(subject: Subject) -> Iterator[Finding]:
    directory = _nearest(subject.config.store.path.parent).resolve()
    kind, options = filesystem(directory, Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape"))
    usage, inodes = shutil.disk_usage(directory), os.statvfs(directory)
    text = f"{directory}: {in_mebibytes(usage.free)} free, filesystem {kind}"
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
    """Return the kind of filesystem that a path is on, and its mount options, from the text of
    proc_pid_mountinfo(5).
    """
    best, found = -1, ("unknown", [""])
    for line in mounts.splitlines():
        mounted, _, what = line.partition(" - ")
        fields = mounted.split(" ")
        # Blanks are written in octal.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        # A later mount hides an earlier one.
        if path.is_relative_to(point) and len(point) >= best:
            best, found = len(point), (what.split(" ")[0], fields[5].split(","))
    return found


def check_daemon(subject: Subject) -> Iterator[Finding]:
    path = subject.config.store.path
    process = holder(path)
    others = (
        running_servers() if not process and subject.file is None and subject.config.store == Config().store else []
    )
    if others:
        yield warning("daemon", f"no server has {path} open, but another server runs here", others[0].advice)
    else:
        yield ok("daemon", f"process {process} has {path} open" if process else f"no server has {path} open")


def check_database(subject: Subject) -> Iterator[Finding]:
    path = subject.config.store.path
    if not path.exists():
        yield ok("database", f"{path} does not exist yet; the server creates it")
        return
    wal = path.with_name(path.name + "-wal")
    wal_bytes = wal.stat().st_size if wal.exists() else 0
    # A database at rest is read as a plain file: SQLite would leave a -shm file beside it.
    at_rest = "&immutable=1" if not wal_bytes and holder(path) is None else ""
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
    text = f"{wal}: {in_mebibytes(wal_bytes)}"
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
        text, _, remedy = str(unfinished(str(path), source)).rpartition(": ")
        yield problem("schema", text, remedy)
    else:
        yield schema_finding(version, known)


def _backlog(connection: sqlite3.Connection, limit: int) -> Iterator[Finding]:
    sql = load_queries("sqlite")
    try:
        (expanded,) = connection.execute(sql["inbox_start"]).fetchone()
        (in_inbox,) = connection.execute(sql["inbox_files"], (expanded,)).fetchone()
        (pending,) = connection.execute(sql["backlog"]).fetchone()
    except sqlite3.OperationalError:
        return  # Another schema, which _schema reports.
    yield backlog_finding(in_inbox + pending, limit)
