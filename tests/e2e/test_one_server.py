"""What deploy/one-server has: Compose, Caddy and nginx, as programs that are installed here run them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import trustme
import yaml

from notify_server.config import Config, load_config
from tests.bench.servers import running
from tests.support.daemon import Daemon
from tests.support.notification import batch_body
from tests.support.waiting import SECONDS, free_port

ROOT: Final = Path(__file__).parents[2]
HERE: Final = ROOT / "deploy" / "one-server"
CALLER: Final = "127.0.0.9"
TOKEN: Final = "callback-token-of-this-test"
FORWARDED: Final = {"Forwarded": "for=192.0.2.1", "X-Forwarded-For": "192.0.2.1"}


async def nothing_yet() -> AsyncIterator[bytes]:
    """Send one byte of a body, and no more."""
    yield b"{"
    await asyncio.Event().wait()


def settings() -> dict[str, str]:
    """What env.example sets."""
    lines = (HERE / "env.example").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_compose_sets_keys_that_exist_and_trusts_caddy_alone() -> None:
    compose: Any = yaml.safe_load((HERE / "compose.yaml").read_text("utf-8"))
    server, caddy = compose["services"]["server"], compose["services"]["caddy"]
    environ = settings()
    for name, value in server["environment"].items():
        environ[name] = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: settings()[found[1]], value)
    config = load_config(None, environ=environ, cwd=HERE)
    addresses = {name: each["networks"]["default"]["ipv4_address"] for name, each in compose["services"].items()}
    (subnet,) = compose["networks"]["default"]["ipam"]["config"]
    assert all(ipaddress.ip_address(each) in ipaddress.ip_network(subnet["subnet"]) for each in addresses.values())
    assert [str(each) for each in config.server.trusted_proxies] == [f"{addresses['caddy']}/32"]
    assert caddy["environment"]["SERVER"] == f"{addresses['server']}:{Config().server.port}"
    assert not config.store.is_postgres
    assert config.auth.callback_token is not None and config.auth.admin_token is None
    assert config.server.public_url == "https://notify.example.com"
    assert int(server["stop_grace_period"].removesuffix("s")) > config.server.shutdown_grace
    # Only this machine reaches the server past Caddy.
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert (HERE / server["build"]["context"]).resolve() == ROOT
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    volume = f"VOLUME {server['volumes'][0].partition(':')[2]}"
    assert volume in (ROOT / "deploy" / "Dockerfile").read_text("utf-8").splitlines()
    assert "deploy/one-server/.env" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


@contextlib.contextmanager
def caddy(folder: Path, port: int, upstream: int) -> Iterator[tuple[str, ssl.SSLContext | None]]:
    program = shutil.which("caddy")
    if program is None:
        pytest.skip("caddy is not installed: apt-get install caddy")
    command = [program, "run", "--adapter", "caddyfile", "--config", str(HERE / "Caddyfile")]
    home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    url = f"http://127.0.0.1:{port}"
    with running(command, port, {"DOMAIN": url, "SERVER": f"127.0.0.1:{upstream}", **home}):
        yield url, None


@contextlib.contextmanager
def nginx(folder: Path, port: int, upstream: int) -> Iterator[tuple[str, ssl.SSLContext | None]]:
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("nginx is not installed: apt-get install nginx")
    folder.mkdir()
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    leaf.private_key_pem.write_to_path(folder / "tls.key")
    for blob in leaf.cert_chain_pems:
        blob.write_to_path(folder / "tls.crt", append=True)
    text = (HERE / "nginx.conf").read_text("utf-8")
    changes = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/nginx/tls": f"{folder}/tls",
        "/var/log/nginx/": f"{folder}/",
        "http://127.0.0.1:8080": f"http://127.0.0.1:{upstream}",
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{name}_temp_path {folder}/{name};" for name in names)
    user = "user root root;" if os.geteuid() == 0 else ""
    main = f"daemon off; {user} pid {folder}/pid; events {{}} http {{ {temporary}\n{text}\n}}"
    (folder / "nginx.conf").write_text(main, "utf-8")
    command = [program, "-e", f"{folder}/error.log", "-p", str(folder), "-c", f"{folder}/nginx.conf"]
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=60, check=True)
    assert "[warn]" not in checked.stderr
    with running(command, port):
        yield f"https://127.0.0.1:{port}", trusted


@contextlib.asynccontextmanager
async def caller(url: str, trusted: ssl.SSLContext | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A client that calls from an address of its own, over one connection for each request."""
    connector = aiohttp.TCPConnector(local_addr=(CALLER, 0), ssl=trusted or True, force_close=True)
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield session


@pytest.mark.parametrize("proxy", [caddy, nginx])
async def test_proxy_in_front_of_one_server_passes_everything_on_and_opens_nothing(tmp_path: Path, proxy: Any) -> None:
    config: Mapping[str, Mapping[str, Any]] = {
        "server": {"trusted_proxies": ["127.0.0.1"]},
        "auth": {"callback_token": TOKEN},
    }
    async with Daemon(tmp_path / "daemon", config) as daemon:
        upstream = int(daemon.url.rpartition(":")[2])
        with proxy(tmp_path / "proxy", free_port(), upstream) as (url, trusted):
            async with caller(url, trusted) as session:
                target = f"/notify?token={TOKEN}"
                async with session.post(target, data=batch_body("b", []), headers=FORWARDED) as answer:
                    assert (answer.status, (await answer.json())["code"]) == (200, "000")
                # The caller's own claim of where it comes from does not count.
                assert daemon.value("SELECT remote_addr FROM notification") == CALLER
                large = batch_body("b", []).ljust(Config().server.body_limit_bytes + 1)
                # nginx reads a body to its end. Caddy passes it on, and cuts off who still sends when the answer comes.
                data = io.BytesIO(large) if proxy is nginx else nothing_yet()
                async with session.post(target, data=data, headers={"Content-Length": str(len(large))}) as answer:
                    assert (answer.status, (await answer.json())["code"]) == (413, "413")
                for headers in ({}, FORWARDED, {"X-Real-IP": "127.0.0.1"}):
                    async with session.get("/api/v1/totals", headers=headers) as answer:
                        assert answer.status == 401
                async with session.get("/api/v1/stream", headers=daemon.admin) as stream, asyncio.timeout(SECONDS):
                    assert (await stream.content.readline()).startswith(b"event: ")
                form = {"token": daemon.admin["Authorization"].removeprefix("Bearer ")}
                async with session.post("/ui/login", data=form, allow_redirects=False) as answer:
                    assert (answer.status, answer.headers["Location"]) == (303, "/")
                    assert ("Secure" in answer.headers["Set-Cookie"]) == url.startswith("https:")
                # In the platform's form when the server is gone.
                await daemon.kill()
                async with session.post(target, data=batch_body("b", [])) as answer:
                    body = await answer.json(content_type=None)
                    assert (answer.status, body["code"], answer.headers["Retry-After"]) == (503, "503", "5")
                    assert body["request_id"]
        for log in (tmp_path / "proxy").glob("*.log"):
            assert TOKEN not in log.read_text("utf-8", "replace")
