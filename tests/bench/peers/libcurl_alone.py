"""The addresses of a file, one to a line, asked with HEAD by libcurl's multi interface as fast as it goes; of the
answers nothing but the status is looked at.
"""

from __future__ import annotations

import json
import resource
import select
import sys
import time
from pathlib import Path

import pycurl


def main(addresses: list[str], concurrency: int, ca_file: str | None) -> None:
    """Ask for all of them, and print what it took as JSON."""
    multi = pycurl.CurlMulti()
    multi.setopt(pycurl.M_MAXCONNECTS, concurrency * 2)
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    left = iter(addresses)
    found = busy = 0

    def ask(handle: pycurl.Curl) -> int:
        address = next(left, None)
        if address is None:
            return 0
        handle.setopt(pycurl.URL, address)
        multi.add_handle(handle)
        return 1

    handles = []
    for _ in range(concurrency):
        handle = pycurl.Curl()
        handle.setopt(pycurl.NOBODY, 1)
        handle.setopt(pycurl.NOSIGNAL, 1)
        handle.setopt(pycurl.PROXY, "")
        handle.setopt(pycurl.TIMEOUT_MS, 20_000)
        handle.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        if ca_file is not None:
            handle.setopt(pycurl.CAINFO, ca_file)
        busy += ask(handle)
        handles.append(handle)
    while busy:
        multi.perform()
        more = 1
        while more:
            more, answered, failed = multi.info_read()
            if failed:
                raise SystemExit(f"libcurl: {failed[0][2]}")
            for handle in answered:
                found += handle.getinfo(pycurl.RESPONSE_CODE) == 200
                multi.remove_handle(handle)
                busy += ask(handle) - 1
        if busy:
            timeout_ms = multi.timeout()
            reads, writes, errors = multi.fdset()
            select.select(reads, writes, errors, 0.1 if timeout_ms < 0 else timeout_ms / 1000)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sys.stdout.write(json.dumps({"found": found, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).read_text().split(), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
