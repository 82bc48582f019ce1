"""Probing through an outgoing proxy, and the headers of single hosts."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import trustme

from tests.support.daemon import Config, Daemon
from tests.support.origin import Answer, Origin
from tests.support.proxy import Proxy

PASSWORD = "pass-of-the-proxy"
SECRET = "Bearer secret-of-the-store"


def through(proxy: Proxy, **verify: Any) -> Config:
    """The settings of a company whose only way out is the proxy; nothing private is allowed."""
    address = f"http://company:{PASSWORD}@127.0.0.1:{proxy.port}"
    return {"verify": {"proxy": address, "allowed_networks": [], "retry_schedule": ["1h"], **verify}}


async def test_files_are_found_through_a_proxy_and_private_literals_are_blocked(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("files.example.com").configure_cert(context)
    async with Origin(tls=context) as origin, Proxy(origin.port) as proxy:
        config = through(proxy, ca_file=str(tmp_path / "ca.pem"))
        async with Daemon(tmp_path, config) as daemon:
            files = await daemon.settle("https", [f"https://files.example.com/{n}%2fa?x=%e6" for n in range(5)])
            assert {(row["state"], row["attempts"], row["remote_addr"]) for row in files.values()} == {
                ("available", 1, None)
            }
            # The host gets neither the proxy's name and password nor anything of its answer.
            assert sorted(hit.path for hit in origin.hits) == [f"/{n}%2fa?x=%e6" for n in range(5)]
            assert not any("proxy-authorization" in hit.headers for hit in origin.hits)
            assert all(head.startswith("CONNECT files.example.com:443 ") for head in proxy.heads)
            assert all("Proxy-Authorization: Basic " in head for head in proxy.heads)
            heads = len(proxy.heads)
            private = await daemon.settle("private", ["http://10.1.2.3/x", "http://[::1]/x", "http://localhost/x"])
            assert {(row["state"], row["reason"]) for row in private.values()} == {("blocked", "private_address")}
            assert len(proxy.heads) == heads
            assert PASSWORD not in daemon.text


async def test_every_byte_of_a_plain_address_passes_a_proxy(tmp_path: Path) -> None:
    async with Origin() as origin, Proxy(origin.port) as proxy, Daemon(tmp_path, through(proxy)) as daemon:
        path = "/%e6%88%bf%2fa.jpg?s=a%2fb%7e"
        files = await daemon.settle("http", [f"http://files.example.com{path}"])
        assert [row["state"] for row in files.values()] == ["available"]
        assert [hit.path for hit in origin.hits] == [f"http://files.example.com{path}"]


async def test_a_host_that_the_proxy_does_not_reach_is_a_connect_error(tmp_path: Path) -> None:
    async with Origin() as origin, Proxy(origin.port) as proxy:
        proxy.refusal = 502
        async with Daemon(tmp_path, through(proxy, retry_schedule=[])) as daemon:
            files = await daemon.settle("b", ["https://files.example.com/x"])
            assert [(row["state"], row["reason"]) for row in files.values()] == [("unavailable", "connect_error")]


async def test_headers_of_a_host_go_to_that_host_alone(tmp_path: Path) -> None:
    async with Origin("127.0.0.2") as store, Origin("127.0.0.3") as other:
        store.on("/moved", Answer(302, {"Location": other.url("/there")}))
        other.on("/back", Answer(302, {"Location": store.url("/x")}))
        hosts = {"127.0.0.2": {"headers": {"Authorization": SECRET, "X-Store": "a b"}}}
        config: Config = {
            "verify": {
                "allowed_networks": ["127.0.0.0/8"], "allowed_ports": [], "retry_schedule": ["1h"], "hosts": hosts,
            },
            "log": {"level": "debug"},
        }  # fmt: skip
        async with Daemon(tmp_path, config) as daemon:
            urls = [store.url("/x"), store.url("/moved"), other.url("/back"), other.url("/y")]
            files = await daemon.settle("b", urls)
            assert {row["state"] for row in files.values()} == {"available"}
            sent = {(hit.path, hit.headers.get("authorization"), hit.headers.get("x-store")) for hit in store.hits}
            assert sent == {("/x", SECRET, "a b"), ("/moved", SECRET, "a b")}
            assert {hit.headers.get("authorization") for hit in other.hits} == {None}
            assert SECRET not in daemon.text
