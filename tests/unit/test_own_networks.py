"""This machine's own addresses, and what the guard makes of them."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from notify_server.model import Reason
from notify_server.verify.guard import Guard
from notify_server.verify.own_networks import own_networks

FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
Local:
  +-- 0.0.0.0/0 2 0 2
     +-- 8.20.0.0/16 2 0 1
        |-- 8.20.3.7
           /32 host LOCAL
        |-- 8.20.255.255
           /32 link BROADCAST
     |-- 127.0.0.1
        /32 host LOCAL
"""
IF_INET6 = """00000000000000000000000000000001 01 80 10 80       lo
2a0104f80c2c5a1e0000000000000001 02 40 00 80     eth0
fe80000000000000940000fffe123456 02 40 20 80     eth0
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "fib_trie").write_text(FIB_TRIE)
    (tmp_path / "if_inet6").write_text(IF_INET6)
    return tmp_path


def test_interface_addresses_and_on_link_prefixes_are_read(proc: Path) -> None:
    assert own_networks(proc) == ["127.0.0.1/32", "2a01:4f8:c2c:5a1e::/64", "8.20.3.7/32", "::1/128", "fe80::/64"]


def test_system_without_the_tables_has_no_own_networks(tmp_path: Path) -> None:
    assert own_networks(tmp_path / "missing") == []


def test_loopback_is_among_the_addresses_of_this_machine() -> None:
    networks = [ip_network(network) for network in own_networks()]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = ip_address(server.getsockname()[0])
    assert any(address in network for network in networks)


@pytest.mark.parametrize(
    "address", ["8.20.3.7", "::ffff:8.20.3.7", "64:ff9b::8.20.3.7", "2a01:4f8:c2c:5a1e::1", "2a01:4f8:c2c:5a1e:9::9"]
)
def test_own_addresses_are_private_unless_allowed(proc: Path, address: str) -> None:
    own = own_networks(proc)
    assert Guard().check_address(address, 80) is None
    assert Guard(own_networks=own).check_address(address, 80) is Reason.PRIVATE_ADDRESS
    assert Guard(allowed_networks=["8.20.0.0/16", "2a01::/16"], own_networks=own).check_address(address, 80) is None


@pytest.mark.parametrize("address", ["8.20.3.8", "2a01:4f8:c2c:5a1f::1", "1.1.1.1"])
def test_addresses_beside_the_own_ones_are_public(proc: Path, address: str) -> None:
    assert Guard(own_networks=own_networks(proc)).check_address(address, 80) is None


@pytest.mark.parametrize("address", ["10.1.2.3", "1.1.1.1", "::ffff:1.1.1.1"])
def test_refused_networks_are_refused_whatever_is_allowed(address: str) -> None:
    guard = Guard(allowed_networks=["10.0.0.0/8", "1.0.0.0/8"], refused_networks=["10.1.0.0/16", "1.1.1.1"])
    assert guard.check_address(address, 80) is Reason.PRIVATE_ADDRESS
    assert guard.check_address("10.2.0.1", 80) is None
    if ":" not in address:
        assert guard.examine(f"http://{address}/x").refusal is Reason.PRIVATE_ADDRESS
