"""Checks what probing needs: name resolution, trusted certificates, file descriptors."""

from __future__ import annotations

import contextlib
import re
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from notify_server.cli.doctor.findings import Finding, Subject, ok, problem, warning
from notify_server.processes.prober_client import system_certificates
from notify_server.store.sqlite.lock import holder
from notify_server.verify.guard import Guard

# Descriptors that the daemon opens besides connections: the database, pipes, the event loop.
DESCRIPTORS_OWN = 64


def check_dns(subject: Subject) -> Iterator[Finding]:
    verify = subject.config.verify
    remedy = "name a working resolver in /etc/resolv.conf"
    try:
        servers = re.findall(r"^\s*nameserver\s+(\S+)", Path("/etc/resolv.conf").read_text("utf-8", "replace"), re.M)
    except OSError as error:
        yield warning("dns", f"/etc/resolv.conf cannot be read ({error.strerror})", remedy)
    else:
        if servers:
            yield ok("dns", f"name servers: {', '.join(servers)}")
        else:
            yield warning("dns", "/etc/resolv.conf names no name server", remedy)
    guard = Guard([], verify.allowed_networks, [])
    hosts = [subject.host] if subject.host else [host for host in verify.allowed_hosts if not host.startswith("*")]
    for host in hosts:
        try:
            addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            yield problem("dns", f"{host} does not resolve ({reason})", f"check the name, or {remedy}")
            continue
        refused = sorted(address for address in addresses if guard.check_address(address, 443) is not None)
        if refused:
            yield warning(
                "dns",
                f"{host} is {', '.join(refused)}, which is not public and never asked",
                "if that is your own store, set [verify] allowed_networks",
            )
        else:
            yield ok("dns", f"{host} is {', '.join(sorted(addresses))}")


def check_trust(subject: Subject) -> Iterator[Finding]:
    path = str(subject.config.verify.ca_file or system_certificates())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    number, why = 0, "it holds no certificate authority"
    try:
        context.load_verify_locations(path)
        number = context.cert_store_stats()["x509_ca"]
    except OSError as error:
        why = str(error)
    if number:
        yield ok("trust", f"{path}: {number} certificate authorities")
    else:
        yield problem(
            "trust",
            f"{path} cannot be used ({why}): every https address fails with tls_error",
            "install ca-certificates, or set [verify] ca_file to certificates in PEM",
        )


def check_descriptors(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    needed = config.server.max_connections + config.verify.concurrency + DESCRIPTORS_OWN
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    whose = "here"
    process = None if config.store.is_postgres else holder(config.store.path)
    with contextlib.suppress(OSError, ValueError, TypeError):
        limits = Path(f"/proc/{int(process or '')}/limits").read_text()
        limit, whose = int(re.findall(r"^Max open files\s+(\d+)", limits, re.M)[0]), f"in process {process}"
    text = f"{limit:,} {whose}, {needed:,} wanted for max_connections and concurrency"
    if limit == resource.RLIM_INFINITY or limit >= needed:
        yield ok("descriptors", text)
    else:
        yield warning(
            "descriptors",
            text,
            f"`ulimit -n {needed}`, LimitNOFILE={needed} for systemd, or a lower [server] max_connections",
        )
