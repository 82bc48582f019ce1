"""One libcurl easy handle: sets it up for a request, reads the answer, and returns the evidence."""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

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
from notify_server.processes.prober_protocol import ProberConfig
from notify_server.processes.sniffing import sniff
from notify_server.verify.guard import Guard

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

# CURLOPT_SUPPRESS_CONNECT_HEADERS, which pycurl does not name: a proxy's answer is not the host's.
_SUPPRESS_CONNECT_HEADERS = 265

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
        self._resolves = False
        # How long the look-up of the host's name has taken, in ms.
        self.looked_up_ms = 0.0
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
        self._proxied = bool(config.proxy)
        curl.setopt(pycurl.PROXY, config.proxy)
        curl.setopt(pycurl.NOPROXY, "" if config.proxy else "*")
        curl.setopt(_SUPPRESS_CONNECT_HEADERS, 1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.FOLLOWLOCATION, 0)
        curl.setopt(pycurl.PATH_AS_IS, 1)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        curl.setopt(pycurl.WRITEFUNCTION, self._write)
        curl.setopt(pycurl.HEADERFUNCTION, self._header)

    def start(self, request: Request, addresses: Sequence[str] = (), looked_up_ms: float = 0.0) -> None:
        """Set the handle up for a request. `addresses` are entries of CURLOPT_RESOLVE that libcurl lacks."""
        self.request = request
        self.looked_up_ms = looked_up_ms
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
            # A proxy gets the whole address, unless it passes on a connection for https.
            whole = self._proxied and url.startswith("http:")
            curl.setopt(pycurl.REQUEST_TARGET, url if whole else url[url.index("/", len("https://")) :])
        # Left set, it would bring back old addresses with each request. pycurl ignores an empty list.
        if addresses:
            curl.setopt(pycurl.RESOLVE, list(addresses))
        elif self._resolves:
            curl.unsetopt(pycurl.RESOLVE)
        self._resolves = bool(addresses)
        timeout_ms, connect_timeout_ms = request.timeout_ms, request.connect_timeout_ms
        if looked_up_ms:
            timeout_ms, connect_timeout_ms = timeout_ms - round(looked_up_ms), connect_timeout_ms - round(looked_up_ms)
        # Most requests differ from the last one only in their address.
        manner = (
            request.method, timeout_ms, connect_timeout_ms, request.fresh, request.keep, request.ranged, request.sniff,
            request.headers,
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
        if request.headers:
            curl.setopt(pycurl.HTTPHEADER, request.headers)
        else:
            curl.unsetopt(pycurl.HTTPHEADER)
        curl.setopt(pycurl.TIMEOUT_MS, max(1, timeout_ms))
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, max(1, connect_timeout_ms))
        curl.setopt(pycurl.FRESH_CONNECT, request.fresh)
        curl.setopt(pycurl.FORBID_REUSE, not request.keep)

    def _open_socket(self, purpose: int, address: Any) -> socket.socket | int:
        # Called for every address about to be dialled, also each of a name's answers in turn: a refused one is skipped,
        # and nothing is sent to it.
        family, kind, protocol, peer = address
        # With a proxy, only the proxy is dialled, which the configuration names.
        refused = None if self._proxied else self._guard.check_address(peer[0], peer[1])
        if refused is not None:
            self._refused = refused
            return int(pycurl.SOCKET_BAD)
        limit = self.request.address_limit if self.request is not None and not self._proxied else 0
        place = peer[:2]
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
            dns = dns_end / 1000 + self.looked_up_ms if dns_end else None
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
            # The address of a proxy is not the file's, and its limit not that of a host.
            None if self._proxied else remote_addr,
            dns,
            connect,
            tls,
            first_byte,
            curl.getinfo(pycurl.TOTAL_TIME_T) / 1000 + self.looked_up_ms,
            *answer[:6],
            self._was_refused_by_proxy() if self._proxied else os_error == errno.ECONNREFUSED,
            not answered and (self._shortage or os_error in _SHORTAGES),
            bool(crowded),
            answer.vendor_request_id,
            answer.vendor_code or (error_code(bytes(self._error)) if self._error else None),
            answer.further,
            sniff(bytes(self._beginning)) if self._beginning and 200 <= status <= 299 else None,
        )

    def _was_refused_by_proxy(self) -> bool:
        """Return whether the proxy has answered that it does not connect to the host."""
        return int(self.curl.getinfo(pycurl.HTTP_CONNECTCODE)) >= 300

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
        if self._proxied and (error == pycurl.E_COULDNT_RESOLVE_PROXY or self._was_refused_by_proxy()):
            return Reason.CONNECT_ERROR
        return _REASONS.get(error, Reason.PROTOCOL_ERROR)
