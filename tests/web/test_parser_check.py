"""The self-check of the parser that is borrowed from aiohttp, and a daemon whose check does not pass."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp.http
import pytest

from notify_server.callbacks.aiohttp_parser import HeadParser, sound_parser
from tests.support.daemon import Daemon, clean_environment
from tests.support.notification import batch_body

BREAKS = {
    "parser is gone": "del aiohttp.http.HttpRequestParser",
    "signature has changed": "aiohttp.http.HttpRequestParser = lambda protocol: None",
    "result has changed": (
        "original = aiohttp.http.HttpRequestParser\n"
        "class Changed:\n"
        "    def __init__(self, *args, **kwargs): self.parser = original(*args, **kwargs)\n"
        "    def feed_data(self, data): return self.parser.feed_data(data)[0]\n"
        "aiohttp.http.HttpRequestParser = Changed"
    ),
}


@pytest.mark.parametrize("break_", BREAKS.values(), ids=list(BREAKS))
async def test_daemon_serves_and_warns_when_the_internals_of_aiohttp_have_changed(tmp_path: Path, break_: str) -> None:
    # Python imports this at its start, before everything else.
    (tmp_path / "sitecustomize.py").write_text(f"import aiohttp.http, aiohttp.web\n{break_}\n")
    root = str(Path(__file__).parents[2])
    environ = {**clean_environment(), "PYTHONPATH": f"{tmp_path}:{root}"}
    async with Daemon(tmp_path / "daemon", environ=environ) as daemon:
        assert (await daemon.post(batch_body("b", []))).status == 200
        assert (await daemon.post(b"{")).status == 400
        assert "aiohttp's internals have changed" in daemon.text


async def test_daemon_with_sound_internals_reads_callbacks_itself_and_does_not_warn(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        assert (await daemon.post(batch_body("b", []))).status == 200
        assert "internals" not in daemon.text


@pytest.mark.parametrize(
    "head",
    [
        b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n",
        b"POST /p HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Encoding: gzip\r\n\r\n",
        b"POST /p HTTP/1.0\r\nHost: h\r\nContent-Length: 1\r\n\r\n",
        b"POST /p HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
async def test_unusual_heads_are_left_to_aiohttp(head: bytes) -> None:
    assert HeadParser(asyncio.get_running_loop()).parse(head) is None


async def test_length_of_thousands_of_digits_is_left_to_aiohttp_or_very_large() -> None:
    head = b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: %b\r\n\r\n" % (b"9" * 5000)
    found = HeadParser(asyncio.get_running_loop()).parse(head)
    assert found is None or found.length >= 10**18


async def test_parser_that_passes_its_check_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    assert sound_parser(loop) is not None
    monkeypatch.delattr(aiohttp.http, "HttpRequestParser")
    assert sound_parser(loop) is None


MALFORMED_CHUNKS = (
    b"zz\r\n{}\r\n",
    b"5\r\n{}\r\n0\r\n\r\n",
    b"-1\r\n{}\r\n",
    b"2\r\n{}xx\r\n",
    b"f" * 5000 + b"\r\n",
)


@pytest.mark.parametrize("variables", [{}, {"AIOHTTP_NO_EXTENSIONS": "1"}], ids=["parser in C", "parser in Python"])
async def test_malformed_chunks_are_refused_without_a_traceback(tmp_path: Path, variables: dict[str, str]) -> None:
    head = b"POST /notify HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def answer(daemon: Daemon, data: bytes, cut: int) -> bytes:
        port = int(daemon.callback.rpartition(":")[2].partition("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data[:cut])
        # By this answer the server has read the first part.
        assert (await daemon.get("/healthz"))[0] == 200
        writer.write(data[cut:])
        line = await reader.readline()
        writer.close()
        return line

    async with Daemon(
        tmp_path, {"server": {"body_timeout": "200ms"}}, environ=clean_environment(**variables)
    ) as daemon:
        cases = [(head + chunks, cut) for chunks in MALFORMED_CHUNKS for cut in (0, len(head), len(head) + 1)]
        lines = await asyncio.gather(*(answer(daemon, *case) for case in cases))
        assert [line for line in lines if line.split()[1] not in (b"400", b"408")] == []
        assert "Traceback" not in daemon.text
        assert (await daemon.post(batch_body("b", []))).status == 200
