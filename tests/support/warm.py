"""Starts `python -m notify_server` by forking a process that has imported it already.

The suite starts it more than a thousand times, and half of its processor time would go into importing the same modules.
A forked process is a process like any other: a child of the test's, with the arguments, environment, working directory,
session and pipes that the test gave. What cannot be set up after the fork is started in the ordinary way: a prefix
such as strace, and variables that Python or the C library read when they start.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m", "notify_server"]
# Read once, when a process starts.
START_VARIABLES = ("PYTHON", "LD_", "LC_", "LANG", "TZ", "MALLOC_", "OPENSSL_", "SSL_")
# Programs that must not be imported: each is the main module of a process of its own.
PROGRAMS = ("notify_server.__main__", "notify_server.processes.keeper", "notify_server.processes.prober")
PR_SET_CHILD_SUBREAPER = 36
LENGTH_BYTES = 4

_popen = subprocess.Popen
_signature = inspect.signature(_popen._execute_child)  # type: ignore[attr-defined]
_start_variables = {name: value for name, value in os.environ.items() if name.startswith(START_VARIABLES)}


class WarmPopen(_popen):  # type: ignore[type-arg]
    """A Popen that forks the program where it can."""

    def _execute_child(self, *arguments: Any) -> None:
        given = _signature.bind(self, *arguments).arguments
        if not _can_fork(given):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        streams = [
            own if end == -1 else end
            for own, end in enumerate((given["p2cread"], given["c2pwrite"], given["errwrite"]))
        ]
        request = {
            "arguments": list(map(os.fsdecode, given["args"][len(PROGRAM) :])),
            "cwd": os.fsdecode(given["cwd"] or Path.cwd()),
            "environ": {
                os.fsdecode(name): os.fsdecode(value)
                for name, value in (os.environ if given["env"] is None else given["env"]).items()
            },
            "new_session": bool(given["start_new_session"]),
        }
        self.pid = _server().fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )


def install() -> None:
    """Let every Popen of this process, asyncio's too, fork the program where it can."""
    subprocess.Popen = WarmPopen  # type: ignore[misc]


def _can_fork(given: Mapping[str, Any]) -> bool:
    arguments = given["args"]
    return (
        isinstance(arguments, (list, tuple))
        and list(arguments[: len(PROGRAM)]) == PROGRAM
        and given["executable"] in (None, sys.executable)
        and given["preexec_fn"] is None
        and not given["pass_fds"]
        and not given["shell"]
        and (given["env"] is None or _starts_alike(given["env"]))
    )


def _starts_alike(environ: Mapping[Any, Any]) -> bool:
    names = {os.fsdecode(name): os.fsdecode(value) for name, value in environ.items()}
    return {name: value for name, value in names.items() if name.startswith(START_VARIABLES)} == _start_variables


@functools.cache
def _server() -> _Server:
    return _Server()


class _Server:
    """The process that forks, as its client sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, other = socket.socketpair()
        self._libc = ctypes.CDLL(None, use_errno=True)
        with other:
            self._process = _popen(
                [sys.executable, "-c", f"from tests.support.warm import serve; serve({other.fileno()})"],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
            )
        atexit.register(self._close)

    def fork(self, request: Mapping[str, Any], streams: list[int]) -> int:
        """Start the program; its process id. It is a child of this process."""
        payload = json.dumps(request).encode()
        with self._lock:
            # The process that forked it ends at once, and whoever is the nearest subreaper becomes the parent.
            self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                self._socket.sendmsg(
                    [len(payload).to_bytes(LENGTH_BYTES, "big")],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))],
                )
                self._socket.sendall(payload)
                answer = self._socket.recv(LENGTH_BYTES, socket.MSG_WAITALL)
            finally:
                self._libc.prctl(PR_SET_CHILD_SUBREAPER, 0)
        if len(answer) != LENGTH_BYTES:
            raise RuntimeError("the process that forks notify_server has ended")
        return int.from_bytes(answer, "big")

    def _close(self) -> None:
        self._socket.close()
        self._process.wait()


def serve(descriptor: int) -> None:
    """Import the program, and fork it for every request that comes over the socket, until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importlib.import_module("notify_server.cli.serve")
    for module in pkgutil.walk_packages(importlib.import_module("notify_server").__path__, "notify_server."):
        if module.name not in PROGRAMS and not module.name.startswith("notify_server.simulator"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as requests:
        while received := _receive(requests):
            request, streams = received
            read, write = os.pipe()
            # The process in between ends at once, so that the program is not a child of this one.
            if (between := os.fork()) == 0:
                if (pid := os.fork()) != 0:
                    os.write(write, pid.to_bytes(LENGTH_BYTES, "big"))
                    os._exit(0)
                requests.close()
                break
            os.waitpid(between, 0)
            os.close(write)
            requests.sendall(os.read(read, LENGTH_BYTES))
            for each in (read, *streams):
                os.close(each)
        else:
            return
    _become(request, streams)


def _receive(requests: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    length, streams, _, _ = socket.recv_fds(requests, LENGTH_BYTES, 3)
    if len(length) < LENGTH_BYTES:
        return None
    payload = requests.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
    return json.loads(payload), streams


def _become(request: Mapping[str, Any], streams: list[int]) -> None:
    if request["new_session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (as long as the process lives)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", line_buffering=os.isatty(1)
    )
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )
    sys.argv[1:] = request["arguments"]
    # `python -m` puts the working directory first.
    sys.path[0] = request["cwd"]
    # Not back to Python's own end: it would free all that was imported, which takes longer than most commands.
    os._exit(_run())


def _run() -> int:
    """Run the program and end it as Python does; the exit code."""
    code = 0
    try:
        runpy.run_module("notify_server", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int):
            code = end.code
        elif end.code is not None:
            print(end.code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    # Either may have been set to None.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            return 120
    return code
