"""`doctor --from`: the public address through a real Caddy and a real nginx, with each fault planted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from notify_server.cli.doctor.findings import Finding, Level
from notify_server.cli.doctor.public import public_checks
from notify_server.cli.doctor.run import look
from notify_server.config import load_config
from tests.bench.servers import running
from tests.e2e.test_one_server import caddy
from tests.support.daemon import Config, Daemon, clean_environment, run_command
from tests.support.origin import Answer, Origin
from tests.support.waiting import free_port

TOKEN = "callback-token-of-this-test"
STORED = "SELECT (SELECT count(*) FROM notification) + (SELECT count(*) FROM batch) + (SELECT count(*) FROM rejection)"

HEADERS = "proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;"
# A path for each fault of a proxy. The server trusts 127.0.0.1 alone.
LOCATIONS = """
location = /notify     { %(headers)s proxy_pass http://127.0.0.1:%(upstream)d; }
location = /elsewhere  { %(headers)s proxy_pass http://127.0.0.1:%(upstream)d; }
location = /lost       { %(headers)s set $args ""; proxy_pass http://127.0.0.1:%(upstream)d/notify; }
location = /bare       { proxy_pass http://127.0.0.1:%(upstream)d/notify; }
location = /untrusted  { %(headers)s proxy_bind 127.0.0.2; proxy_pass http://127.0.0.1:%(upstream)d/notify; }
location = /insecure   { proxy_set_header X-Forwarded-For $remote_addr;
                         proxy_pass http://127.0.0.1:%(upstream)d/notify; }
location = /down       { proxy_pass http://127.0.0.1:%(closed)d; }
location = /other      { proxy_pass http://127.0.0.1:%(other)d/notify; }
location = /moved      { return 301 https://www.example.com/notify; }
location = /small      { return 413; }
location = /welcome    { return 200 "Welcome!"; }
"""


@contextlib.contextmanager
def nginx(folder: Path, port: int, upstream: int, other: int) -> Iterator[Path]:
    """nginx with TLS; yields the certificate of the authority."""
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("nginx is not installed: apt-get install nginx")
    folder.mkdir()
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    leaf.private_key_and_cert_chain_pem.write_to_path(folder / "tls.pem")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{name}_temp_path {folder}/{name};" for name in names)
    user = "user root root;" if os.geteuid() == 0 else ""
    locations = LOCATIONS % {"headers": HEADERS, "upstream": upstream, "closed": free_port(), "other": other}
    tls = f"ssl_certificate {folder}/tls.pem; ssl_certificate_key {folder}/tls.pem;"
    server = f"server {{ listen 127.0.0.1:{port} ssl; {tls} {locations} }}"
    main = f"daemon off; {user} pid {folder}/pid; events {{}} http {{ access_log off; {temporary} {server} }}"
    (folder / "nginx.conf").write_text(main, "utf-8")
    command = [program, "-e", f"{folder}/error.log", "-p", str(folder), "-c", f"{folder}/nginx.conf"]
    subprocess.run([*command, "-t"], capture_output=True, timeout=60, check=True)
    with running(command, port):
        yield folder / "authority.pem"


def worst(findings: list[Finding]) -> Finding:
    return max(findings, key=lambda each: list(Level).index(each.level))


async def test_each_fault_in_front_of_the_server_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Config = {"server": {"trusted_proxies": ["127.0.0.1"]}, "auth": {"callback_token": TOKEN}}
    async with Daemon(tmp_path / "server", settings) as daemon, Daemon(tmp_path / "other") as other:
        config = load_config(tmp_path / "server" / "config.toml", environ={})
        port = free_port()
        upstream, another = (int(each.url.rpartition(":")[2]) for each in (daemon, other))
        with nginx(tmp_path / "nginx", port, upstream, another) as authority:
            base = f"https://127.0.0.1:{port}"

            async def tried(address: str) -> list[Finding]:
                return await asyncio.to_thread(look, public_checks(config, None, address, None))

            untrusted = worst(await tried(f"{base}/notify?token={TOKEN}"))
            assert "TLS: the certificate is not trusted" in untrusted.text
            monkeypatch.setenv("SSL_CERT_FILE", str(authority))
            good = await tried(f"{base}/notify?token={TOKEN}")
            assert [each.level for each in good] == [Level.OK, Level.OK], good
            assert "this caller is seen as 127.0.0.1" in good[1].text
            for address, said, remedy in [
                (f"{base}/notify", "401, the address has no token", "add ?token="),
                (f"{base}/notify?token=wrong", "401, the token is not the [auth] callback_token", "configured token"),
                (f"{base}/lost?token={TOKEN}", "401, the token is lost on the way", "keep the query"),
                (f"{base}/elsewhere?token={TOKEN}", "404, nothing takes callbacks at this path", "the path is /notify"),
                (f"{base}/bare?token={TOKEN}", "proxy headers: none", "X-Forwarded-For"),
                (f"{base}/untrusted?token={TOKEN}", "proxy headers: not believed", 'trusted_proxies = ["127.0.0.2"]'),
                (f"{base}/insecure?token={TOKEN}", "X-Forwarded-Proto does not say https", "X-Forwarded-Proto"),
                (f"{base}/down?token={TOKEN}", "502, the proxy gets no answer", "start the server"),
                (f"{base}/other?token={TOKEN}", "another notify_server answers", "--config"),
                (f"{base}/moved?token={TOKEN}", "redirects to https://www.example.com/notify (301)", "register"),
                (f"{base}/small?token={TOKEN}", "413, a limit in front", "9 MB"),
                (f"{base}/welcome?token={TOKEN}", "another program (nginx", "/notify"),
                (f"http://127.0.0.1:{port}/notify?token={TOKEN}", f"port {port} speaks https", "write https"),
                (f"https://127.0.0.1:{upstream}/notify", "TLS: the handshake fails", "write http"),
                (f"http://127.0.0.1:{free_port()}/notify", "refuses connections", "security group"),
                ("http://no-such-host.invalid/notify", "does not resolve", "DNS record"),
                ("notify.example.com", "is not an address", "https://HOST/notify"),
            ]:
                finding = worst(await tried(address))
                assert said in finding.text, (address, finding)
                assert finding.remedy is not None and remedy in finding.remedy, (address, finding)
                assert TOKEN not in finding.text + finding.remedy
        # Nothing became a batch or an event. The other server keeps what it refuses, as it does with any body.
        assert daemon.value(STORED) == 0 and daemon.value("SELECT count(*) FROM event") == 0
        assert other.value("SELECT count(*) FROM batch") == 0


async def test_doctor_through_caddy_pings_endpoints_and_checks_a_picture(tmp_path: Path) -> None:
    async with Origin() as origin:
        origin.on("/gone.jpg", Answer(410))
        forward = [
            {"name": name, "url": origin.url(path), "allowed_networks": ["127.0.0.0/8"]}
            for name, path in (("good", "/hook"), ("bad", "/gone.jpg"))
        ]
        port = free_port()
        settings: Config = {
            "server": {"trusted_proxies": ["127.0.0.1"], "port": port},
            "auth": {"callback_token": TOKEN},
            "forward": forward,
        }
        async with Daemon(tmp_path / "server", settings) as daemon:
            with caddy(tmp_path / "caddy", free_port(), port) as (url, _):
                end = await run_command(
                    *("doctor", "--json", "--from", f"{url}/notify?token={TOKEN}", "--picture", origin.url("/a.jpg")),
                    cwd=daemon.folder,
                    environ=clean_environment(),
                )
        findings = json.loads(end.stdout)["findings"]
        by_text = {each["text"]: each["level"] for each in findings}
        assert by_text[f"{url}/notify: this server answers there; the sample was not stored"] == "ok"
        assert by_text["proxy headers: this caller is seen as 127.0.0.1"] == "ok"
        assert any(text.startswith("good: test.ping was delivered") for text in by_text)
        assert any(text.startswith("bad: test.ping was not delivered") for text in by_text)
        assert by_text[f"{origin.url('/a.jpg')}: available"] == "ok"
        assert end.code == 1 and TOKEN not in end.stdout
