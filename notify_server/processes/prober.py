"""A child process that makes HTTP requests: requests in on standard input, evidence out on standard output.

It knows no database, no schedule and no files. It ends when its standard input does, so it cannot outlive the daemon.
The first frame in is a `ProberConfig`, every later one a list of `Request`; the first frame out is a `Ready`,
every later one a list of `Evidence`.

libcurl's own multi loop is driven with select(): measured against its socket callbacks and epoll it probes 1.5 times
as many files a second. select() knows descriptors up to 1,023, which bounds how many requests one prober may have in
flight.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import time
from collections import Counter
from typing import Any

import msgspec
import pycurl

from notify_server.model import Evidence, Reason, Request
from notify_server.processes.prober_headers import (
    NO_ANSWER,
    STATUS_LINE,
    error_code,
    has_xml,
    read_headers,
    status_of,
)
from notify_server.processes.prober_protocol import ProberConfig, Ready
from notify_server.processes.sniffing import sniff
from notify_server.processes.worker import Input, Output, follow_daemon
from notify_server.verify.guard import Guard

# Evidence is sent in batches: when there is this much of it, or when the first has waited this long. A frame costs the
# daemon a wake-up, whatever its size. A batch is at most half of what is in flight, so that the daemon judges one half
# and sends new requests while the prober works on the other.
MAX_TOGETHER = 64
TOGETHER_SECONDS = 0.002
# Connections kept: twice the requests in flight, and some for each of many hosts. select() handles descriptors up to
# 1,023, and requests in flight need some too.
MIN_KEPT, MAX_KEPT = 400, 800


_TLS_ERRORS = frozenset(
    {
        pycurl.E_SSL_CONNECT_ERROR,
        pycurl.E_PEER_FAILED_VERIFICATION,
        pycurl.E_SSL_CERTPROBLEM,
        pycurl.E_SSL_CIPHER,
        pycurl.E_SSL_CACERT_BADFILE,
        pycurl.E_SSL_ISSUER_ERROR,
        pycurl.E_SSL_PINNEDPUBKEYNOTMATCH,
        pycurl.E_SSL_INVALIDCERTSTATUS,
    }
)
_REASONS = {
    pycurl.E_COULDNT_RESOLVE_HOST: Reason.DNS_ERROR,
    pycurl.E_COULDNT_CONNECT: Reason.CONNECT_ERROR,
    pycurl.E_OPERATION_TIMEDOUT: Reason.TIMEOUT,
    pycurl.E_URL_MALFORMAT: Reason.INVALID_URL,
} | dict.fromkeys(_TLS_ERRORS, Reason.TLS_ERROR)

# An error's code is within the beginning of its body.
_ERROR_BYTES = 2048

# The bytes that tell a file's kind.
_SNIFFED_BYTES = 512

# Errors of connect() when this machine has no port, descriptor or memory left.
_SHORTAGES = frozenset({errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Handle:
    """One libcurl easy handle, used for one request after the other; its connections belong to the multi handle."""

    def __init__(self, config: ProberConfig, guard: Guard, under_way: Counter[tuple[str, int]]) -> None:
        self._guard = guard
        # Requests in flight by dialled address and port, of all handles; and those that this handle has dialled.
        self._under_way = under_way
        self._places: list[tuple[str, int]] = []
        self._crowded = ""
        self._lines: list[bytes] = []
        self._body_bytes = 0
        self._body_limit = 1
        # The beginning of an error's body, None where it is not read.
        self._error: bytearray | None = None
        # The beginning of the file, None where it is not read.
        self._beginning: bytearray | None = None
        self._refused: Reason | None = None
        self._shortage = False
        self._dialled = False
        self._behind = False
        self._interim = False
        self._complete = False
        self._manner: tuple[object, ...] = ()
        self._sets_target = False
        self.request: Request | None = None
        self.curl = curl = pycurl.Curl()
        curl.handle = self
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.USERAGENT, config.user_agent)
        curl.setopt(pycurl.CAINFO, config.ca_file)
        if config.referer:
            curl.setopt(pycurl.REFERER, config.referer)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        # Proxies from the environment would dial in our place, unguarded.
        curl.setopt(pycurl.PROXY, "")
        curl.setopt(pycurl.NOPROXY, "*")
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.FOLLOWLOCATION, 0)
        curl.setopt(pycurl.PATH_AS_IS, 1)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        curl.setopt(pycurl.WRITEFUNCTION, self._write)
        curl.setopt(pycurl.HEADERFUNCTION, self._header)

    def start(self, request: Request) -> None:
        """Set the handle up for a request."""
        self.request = request
        self._lines = []
        self._body_bytes = 0
        self._body_limit = _SNIFFED_BYTES if request.sniff else 1 if request.ranged else 0
        self._error = None
        self._beginning = bytearray() if request.sniff else None
        self._refused = None
        self._shortage = False
        self._crowded = ""
        self._dialled = False
        self._behind = False
        self._interim = False
        self._complete = False
        curl = self.curl
        curl.setopt(pycurl.URL, url := request.url)
        if self._sets_target or "%" in url:
            # libcurl since 8.20 rewrites percent escapes, which breaks signed addresses. The option cannot be unset.
            self._sets_target = True
            curl.setopt(pycurl.REQUEST_TARGET, url[url.index("/", len("https://")) :])
        # Most requests differ from the last one only in their address.
        manner = (
            request.method, request.timeout_ms, request.connect_timeout_ms, request.fresh, request.keep, request.ranged,
            request.sniff,
        )  # fmt: skip
        if manner == self._manner:
            return
        self._manner = manner
        if request.method == "HEAD":
            curl.setopt(pycurl.NOBODY, 1)
            curl.unsetopt(pycurl.RANGE)
        else:
            curl.setopt(pycurl.HTTPGET, 1)
            if request.ranged:
                curl.setopt(pycurl.RANGE, f"0-{_SNIFFED_BYTES - 1}" if request.sniff else "0-0")
            else:
                curl.unsetopt(pycurl.RANGE)
        curl.setopt(pycurl.TIMEOUT_MS, max(1, request.timeout_ms))
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, max(1, request.connect_timeout_ms))
        curl.setopt(pycurl.FRESH_CONNECT, request.fresh)
        curl.setopt(pycurl.FORBID_REUSE, not request.keep)

    def _open_socket(self, purpose: int, address: Any) -> socket.socket | int:
        # Called for every address about to be dialled, also each of a name's answers in turn: a refused one is skipped,
        # and nothing is sent to it.
        family, kind, protocol, peer = address
        refused = self._guard.check_address(peer[0], peer[1])
        if refused is not None:
            self._refused = refused
            return int(pycurl.SOCKET_BAD)
        limit, place = self.request.address_limit if self.request is not None else 0, peer[:2]
        if limit and self._under_way[place] >= limit:
            self._crowded = peer[0]
            return int(pycurl.SOCKET_BAD)
        try:
            opened = socket.socket(family, kind, protocol)
            # pycurl duplicates the descriptor, and keeps it to itself when it cannot.
            os.close(os.dup(opened.fileno()))
        except OSError as error:
            self._shortage = error.errno in _SHORTAGES
            return int(pycurl.SOCKET_BAD)
        self._dialled = True
        self._under_way[place] += 1
        self._places.append(place)
        return opened

    def _header(self, line: bytes) -> int | None:
        if self._complete:
            return None  # Trailers, after the body.
        self._lines.append(line)
        if line.startswith(STATUS_LINE):
            status = status_of(line)
            self._interim = status.startswith(b"1")
            self._error = bytearray() if status.startswith((b"4", b"5")) else None
            # A bad answer on a reused connection does not count, and may be data that the server sent late after the
            # previous answer. This request's own answer would then still follow, so the connection is closed: it would
            # be one answer behind forever.
            self._behind = not self._dialled and not status.startswith((b"1", b"2"))
        elif line in (b"\r\n", b"\n"):
            self._complete = not self._interim
            if self._error is not None and self._complete and has_xml(self._lines):
                self._body_limit = _ERROR_BYTES
            return -1 if self._behind and self._complete else None
        return None

    def _write(self, data: bytes) -> int | None:
        # A server that ignores the range sends the whole file: only its headers are needed, so it is cut off.
        self._body_bytes += len(data)
        if self._error is not None:
            self._error += data[: max(0, self._body_limit - len(self._error))]
        elif self._beginning is not None:
            self._beginning += data[: max(0, _SNIFFED_BYTES - len(self._beginning))]
        return None if self._body_bytes <= self._body_limit else 0

    def finish(self, error: int | None) -> Evidence:
        """Return the evidence of the request, which ended with libcurl's `error`, or with an answer (None)."""
        curl, request = self.curl, self.request
        assert request is not None
        status = curl.getinfo(pycurl.RESPONSE_CODE)
        # Complete headers decide; the outcome of the body makes no difference.
        answered = self._complete and 200 <= status <= 599
        self._forget_places()
        crowded = self._crowded if error is not None and not answered else ""
        remote_addr = crowded or curl.getinfo(pycurl.PRIMARY_IP) or None
        # Nothing was dialled: the connection had carried another answer before.
        reused = remote_addr is not None and not self._dialled and self._refused is None
        dns = connect = tls = first_byte = None
        begin = 0
        if not reused:
            dns_end = curl.getinfo(pycurl.NAMELOOKUP_TIME_T)
            connect_end = curl.getinfo(pycurl.CONNECT_TIME_T)
            tls_end = curl.getinfo(pycurl.APPCONNECT_TIME_T)
            dns = dns_end / 1000 if dns_end else None
            connect = (connect_end - dns_end) / 1000 if connect_end else None
            tls = (tls_end - connect_end) / 1000 if tls_end else None
            begin = tls_end or connect_end
        if self._lines and (first_byte_end := curl.getinfo(pycurl.STARTTRANSFER_TIME_T)):
            first_byte = max(0, first_byte_end - begin) / 1000
        answer = read_headers(self._lines) if answered else NO_ANSWER
        os_error = curl.getinfo(pycurl.OS_ERRNO) if error == pycurl.E_COULDNT_CONNECT else 0
        return Evidence(
            request.id,
            status if answered else None,
            None if answered else self._failure(error, reached=remote_addr is not None),
            reused,
            remote_addr,
            dns,
            connect,
            tls,
            first_byte,
            curl.getinfo(pycurl.TOTAL_TIME_T) / 1000,
            *answer[:6],
            os_error == errno.ECONNREFUSED,
            not answered and (self._shortage or os_error in _SHORTAGES),
            bool(crowded),
            answer.vendor_request_id,
            answer.vendor_code or (error_code(bytes(self._error)) if self._error else None),
            answer.further,
            sniff(bytes(self._beginning)) if self._beginning and 200 <= status <= 299 else None,
        )

    def _forget_places(self) -> None:
        for place in self._places:
            self._under_way[place] -= 1
            if not self._under_way[place]:
                del self._under_way[place]
        self._places.clear()

    def _failure(self, error: int | None, *, reached: bool) -> Reason:
        if error is None:
            return Reason.PROTOCOL_ERROR
        if self._refused is not None and not self._dialled:
            return self._refused
        if error == pycurl.E_OPERATION_TIMEDOUT and not (reached or self.curl.getinfo(pycurl.NAMELOOKUP_TIME_T)):
            # The time-out came before there was an address.
            return Reason.DNS_ERROR
        return _REASONS.get(error, Reason.PROTOCOL_ERROR)


class Prober:
    """Reads requests, drives libcurl, writes evidence, until its input ends."""

    def __init__(self, source: int, sink: int) -> None:
        self._source = source
        self._output = Output(sink)
        self._input = Input(source, self._output)
        self._multi = pycurl.CurlMulti()
        self._idle: list[Handle] = []
        self._under_way: Counter[tuple[str, int]] = Counter()
        self._busy = 0
        self._evidence: list[Evidence] = []
        self._flush_at = 0.0
        self._together = 1
        self._decode = msgspec.msgpack.Decoder(list[Request]).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._config = msgspec.msgpack.decode(self._input.first(), type=ProberConfig)
        self._guard = Guard(
            self._config.allowed_hosts,
            self._config.allowed_networks,
            self._config.allowed_ports,
            self._config.refused_networks,
            self._config.own_networks,
        )
        self._multi.setopt(pycurl.M_MAXCONNECTS, min(max(self._config.concurrency * 2, MIN_KEPT), MAX_KEPT))
        self._output.send(self._encode(Ready(pycurl.version_info()[1])))

    def _send(self, evidence: list[Evidence]) -> None:
        self._output.send(self._encode(evidence))

    def run(self) -> None:
        """Work until standard input ends (EOFError) or standard output is gone (BrokenPipeError)."""
        multi = self._multi
        while True:
            # Without a request in flight only the next frame can wake it up.
            reads, writes, errors = multi.fdset() if self._busy else ([], [], [])
            reads.append(self._source)
            ready, _, _ = select.select(reads, writes, errors, self._patience())
            if self._source in ready:
                for payload in self._input.read():
                    for request in self._decode(payload):
                        self._start(request)
                self._together = min(MAX_TOGETHER, max(1, self._busy // 2))
            if self._busy:
                multi.perform()
                self._collect()
            # With nothing else to do, waiting longer gains nothing.
            if self._evidence and (not self._busy or time.monotonic() >= self._flush_at):
                self._flush()

    def _patience(self) -> float | None:
        """Return how long to wait for an event, in seconds; None is forever."""
        timeout_ms = self._multi.timeout() if self._busy else -1
        patience = None if timeout_ms < 0 else timeout_ms / 1000
        if self._evidence:
            flush = max(0.0, self._flush_at - time.monotonic())
            return flush if patience is None else min(flush, patience)
        return patience

    def _start(self, request: Request) -> None:
        handle = self._idle.pop() if self._idle else Handle(self._config, self._guard, self._under_way)
        try:
            handle.start(request)
        except (ValueError, pycurl.error):
            # The guard cannot read this address; libcurl cannot even be given it.
            self._idle.append(handle)
            self._send([Evidence(request.id, None, Reason.INVALID_URL, False, None, None, None, None, None, 0.0)])
            return
        self._multi.add_handle(handle.curl)
        self._busy += 1

    def _collect(self) -> None:
        more = 1
        while more:
            more, answered, failed = self._multi.info_read()
            for curl in answered:
                self._tell(self._finish(curl, None))
            for curl, error, _ in failed:
                self._tell(self._finish(curl, error))

    def _tell(self, evidence: Evidence) -> None:
        if not self._evidence:
            self._flush_at = time.monotonic() + TOGETHER_SECONDS
        self._evidence.append(evidence)
        if len(self._evidence) >= self._together:
            self._flush()

    def _flush(self) -> None:
        self._send(self._evidence)
        self._evidence = []

    def _finish(self, curl: Any, error: int | None) -> Evidence:
        handle: Handle = curl.handle
        evidence = handle.finish(error)
        self._multi.remove_handle(curl)
        self._idle.append(handle)
        self._busy -= 1
        return evidence


def main() -> None:
    """Run the process. It ends quietly when the daemon does."""
    follow_daemon(signal.SIGKILL)
    # Callbacks and the keeper come first when there are not enough processors for all.
    os.nice(10)
    try:
        Prober(sys.stdin.fileno(), sys.stdout.fileno()).run()
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
