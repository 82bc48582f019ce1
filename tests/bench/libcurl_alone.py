"""So many HEADs by libcurl's multi interface, as fast as it goes, and nothing done with the answers."""

from __future__ import annotations

import json
import os
import resource
import select
import sys
import time
from pathlib import Path

import pycurl


def main(files: int, url: str, concurrency: int) -> None:
    multi = pycurl.CurlMulti()
    multi.setopt(pycurl.M_MAXCONNECTS, concurrency * 2)
    started, done, next_file = time.perf_counter(), 0, 0
    handles = []
    for _ in range(concurrency):
        handle = pycurl.Curl()
        handle.setopt(pycurl.NOBODY, 1)
        handle.setopt(pycurl.NOSIGNAL, 1)
        handle.setopt(pycurl.PROXY, "")
        handle.setopt(pycurl.TIMEOUT_MS, 20_000)
        handle.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        handle.setopt(pycurl.URL, f"{url}/IMAGE/{next_file}")
        multi.add_handle(handle)
        handles.append(handle)
        next_file += 1
    while done < files:
        multi.perform()
        more = 1
        while more:
            more, answered, failed = multi.info_read()
            if failed:
                raise SystemExit(f"libcurl: {failed[0][2]}")
            for handle in answered:
                multi.remove_handle(handle)
                done += 1
                if next_file < files:
                    handle.setopt(pycurl.URL, f"{url}/IMAGE/{next_file}")
                    multi.add_handle(handle)
                    next_file += 1
        if done < files:
            reads, writes, errors = multi.fdset()
            timeout_ms = multi.timeout()
            select.select(reads, writes, errors, 0.1 if timeout_ms < 0 else timeout_ms / 1000)
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    result = {
        "rate": files / seconds,
        "cpu_us": (usage.ru_utime + usage.ru_stime) / files * 1e6,
        "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
