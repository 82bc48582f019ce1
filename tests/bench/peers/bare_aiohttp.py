"""The least that aiohttp can do for a callback: uvloop, msgspec, and no store."""

from __future__ import annotations

import asyncio
import sys

import uvloop
from aiohttp import web

from notify_server.contract.wire import parse_notification

ACK = '{"request_id":"0","code":"000","msg":"成功","data":null}'.encode()


async def _callback(request: web.BaseRequest) -> web.Response:
    parse_notification(await request.read(), max_files=10_000)
    return web.Response(body=ACK, content_type="application/json")


async def _main(form: str, port: int) -> None:
    runner: web.BaseRunner
    if form == "application":
        app = web.Application()
        app.router.add_post("/notify", _callback)
        runner = web.AppRunner(app, access_log=None)
    else:
        runner = web.ServerRunner(web.Server(_callback, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], int(sys.argv[2])))
