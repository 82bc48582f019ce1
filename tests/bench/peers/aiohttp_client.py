"""The addresses of a file, one to a line, asked with HEAD by a pool of an aiohttp client's tasks on uvloop."""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import uvloop


async def _work(session: aiohttp.ClientSession, addresses: Iterator[str]) -> int:
    found = 0
    for address in addresses:
        async with session.head(address, allow_redirects=False) as response:
            found += response.status == 200
    return found


async def _main(addresses: list[str], concurrency: int, ca_file: str | None) -> None:
    tls = ssl.create_default_context(cafile=ca_file)
    connector = aiohttp.TCPConnector(limit=concurrency, ssl=tls, keepalive_timeout=300)
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    async with aiohttp.ClientSession(connector=connector) as session:
        shared = iter(addresses)
        found = sum(await asyncio.gather(*(_work(session, shared) for _ in range(concurrency))))
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sys.stdout.write(json.dumps({"found": found, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    uvloop.run(
        _main(Path(sys.argv[1]).read_text().split(), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
    )
