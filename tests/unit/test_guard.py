"""The guard. Rows are those of the threat table; every test's name is what the guard promises."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import pycurl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notify_server.model import Reason, Target
from notify_server.verify.guard import SPECIAL_PURPOSE, Guard, printable_url

GUARD = Guard()
OPEN = Guard(allowed_networks=["0.0.0.0/0", "::/0"])
INVALID = Target("", "", "", Reason.INVALID_URL)
few = settings(max_examples=200, deadline=None)


def refusal(host: str, guard: Guard = GUARD) -> Reason | None:
    return guard.examine(f"http://{host}/file.jpg").refusal


def in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


# -- rows 1-7, 15-19: addresses as they are usually written ------------------------------------------------------------

PRIVATE = {
    "row 1": ["127.0.0.1", "127.255.255.254", "127.0.0.0"],
    "row 2": ["0.0.0.0", "::", "::1", "0.255.255.255"],
    "row 3": ["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255"],
    "row 4": ["169.254.169.254", "169.254.170.2", "fd00:ec2::254", "100.100.100.200", "168.63.129.16"],
    "row 5": ["100.64.0.1", "100.127.255.254"],
    "row 6": ["192.0.0.9", "192.0.2.1", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.9", "192.88.99.1"],
    "row 7": ["224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.254", "255.255.255.255", "ff02::1", "ff0e::1"],
    "row 14": [
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
        "0:0:0:0:0:ffff:7f00:0001",
        "::FFFF:10.0.0.1",
        "::ffff:0:127.0.0.1",
    ],
    "row 15": ["::127.0.0.1", "::7f00:1", "::8.8.8.8", "::2"],
    "row 16": [
        "64:ff9b::7f00:1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",
        "64:ff9b:1::8.8.8.8",
    ],
    "row 17": ["2002:7f00:1::1", "2002:a00:1::", "2002:808:808::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "row 18": ["fc00::1", "fdff:ffff::1", "fec0::1", "feff::1", "fe80::1", "febf::1"],
    "row 19": ["2001:db8::1", "3fff::1", "3fff:fff::1", "5f00::1", "100::1", "100:0:0:1::1", "4000::1", "1fff::1"],
}


@pytest.mark.parametrize("address", [pytest.param(a, id=f"{row}: {a}") for row, each in PRIVATE.items() for a in each])
def test_an_address_that_is_not_publicly_reachable_is_neither_examined_nor_dialled_as_one(address: str) -> None:
    assert GUARD.check_address(address, 80) is Reason.PRIVATE_ADDRESS
    target = GUARD.examine(f"http://{in_url(address)}/x")
    assert target.refusal is Reason.PRIVATE_ADDRESS
    assert target.hostname == str(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "8.8.8.8", "93.184.216.34", "223.5.5.5", "2606:4700::1111", "2001:4860:4860::8888"),
        *("2400:3200::1", "::ffff:8.8.8.8", "::ffff:808:808", "64:ff9b::8.8.8.8", "100.63.255.254"),
        *("100.128.0.1", "2620:4f:8000::1"),
    ],
)
def test_a_public_address_is_examined_and_dialled(address: str) -> None:
    assert GUARD.check_address(address, 80) is None
    assert refusal(in_url(address)) is None


# A public neighbour is missing where the neighbour is in another refused prefix, or in IPv6 outside 2000::/3.
IPV4_NEIGHBOURS = {
    "0.0.0.0/8": (None, "1.0.0.0"),
    "10.0.0.0/8": ("9.255.255.255", "11.0.0.0"),
    "100.64.0.0/10": ("100.63.255.255", "100.128.0.0"),
    "127.0.0.0/8": ("126.255.255.255", "128.0.0.0"),
    "169.254.0.0/16": ("169.253.255.255", "169.255.0.0"),
    "172.16.0.0/12": ("172.15.255.255", "172.32.0.0"),
    "192.0.0.0/24": ("191.255.255.255", "192.0.1.0"),
    "192.0.2.0/24": ("192.0.1.255", "192.0.3.0"),
    "192.88.99.0/24": ("192.88.98.255", "192.88.100.0"),
    "192.168.0.0/16": ("192.167.255.255", "192.169.0.0"),
    "198.18.0.0/15": ("198.17.255.255", "198.20.0.0"),
    "198.51.100.0/24": ("198.51.99.255", "198.51.101.0"),
    "203.0.113.0/24": ("203.0.112.255", "203.0.114.0"),
    "224.0.0.0/4": ("223.255.255.255", None),
    "240.0.0.0/4": (None, None),
    "168.63.129.16/32": ("168.63.129.15", "168.63.129.17"),
}
IPV6_NEIGHBOURS = {
    "2001::/23": ("2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "2001:200::"),
    "2001:db8::/32": ("2001:db7:ffff:ffff:ffff:ffff:ffff:ffff", "2001:db9::"),
    "2002::/16": ("2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "2003::"),
    "3fff::/20": ("3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "3fff:1000::"),
}


@pytest.mark.parametrize("prefix", [prefix for prefix, _ in SPECIAL_PURPOSE])
def test_a_refused_prefix_ends_exactly_where_the_registry_ends_it(prefix: str) -> None:
    network = ip_network(prefix)
    for inside in (network[0], network[-1]):
        assert GUARD.check_address(str(inside), 80) is Reason.PRIVATE_ADDRESS
    neighbours = IPV4_NEIGHBOURS[prefix] if network.version == 4 else IPV6_NEIGHBOURS.get(prefix, (None, None))
    for neighbour, distance in zip(neighbours, (-1, network.num_addresses), strict=True):
        if neighbour is not None:
            assert ip_address(neighbour) == network[0] + distance
            assert GUARD.check_address(neighbour, 80) is None
            assert refusal(in_url(neighbour)) is None


def test_ipv6_is_public_only_within_what_iana_allocates_for_global_unicast() -> None:
    unicast = IPv6Network("2000::/3")
    assert GUARD.check_address(str(unicast[0] - 1), 80) is Reason.PRIVATE_ADDRESS
    assert GUARD.check_address(str(unicast[0]), 80) is None
    assert GUARD.check_address(str(unicast[-1]), 80) is None
    assert GUARD.check_address(str(unicast[-1] + 1), 80) is Reason.PRIVATE_ADDRESS


# -- rows 8-14: the same addresses in disguise -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "address"),
    [
        pytest.param(host, address, id=f"{row}: {host!a}")
        for row, host, address in [
            ("row 8", "2130706433", "127.0.0.1"),
            ("row 8", "2852039166", "169.254.169.254"),
            ("row 8", "0", "0.0.0.0"),
            ("row 8", "4294967295", "255.255.255.255"),
            ("row 9", "0x7f000001", "127.0.0.1"),
            ("row 9", "0X7F.0x0.0x0.0x1", "127.0.0.1"),
            ("row 9", "0x000000007f000001", "127.0.0.1"),
            ("row 9", "0x", "0.0.0.0"),
            ("row 10", "0177.0.0.1", "127.0.0.1"),
            ("row 10", "017700000001", "127.0.0.1"),
            ("row 10", "0000000177.00.00.01", "127.0.0.1"),
            ("row 10", "0251.0376.0251.0376", "169.254.169.254"),
            ("row 11", "127.1", "127.0.0.1"),
            ("row 11", "127.0.1", "127.0.0.1"),
            ("row 11", "10.65535", "10.0.255.255"),
            ("row 11", "0x7f.1", "127.0.0.1"),
            ("row 11", "0177.0x1", "127.0.0.1"),
            ("row 11", "169.254.43518", "169.254.169.254"),
            ("row 12", "127.0.0.1.", "127.0.0.1"),
            ("row 12", "2130706433.", "127.0.0.1"),
            ("row 12", "0x7f.1.", "127.0.0.1"),
            ("row 13", "①②⑦.⓪.⓪.①", "127.0.0.1"),
            ("row 13", "１２７.0.0.1", "127.0.0.1"),
            ("row 13", "127。0。0。1", "127.0.0.1"),
            ("row 13", "127．0｡0.1。", "127.0.0.1"),
            ("row 13", "②①③⓪⑦⓪⑥④③③", "127.0.0.1"),
            ("row 13", "０ｘ７ｆ.1", "127.0.0.1"),
            ("row 13", "𝟏𝟐𝟕.𝟎.𝟎.𝟏", "127.0.0.1"),
            ("row 13", "¹²⁷.0.0.1", "127.0.0.1"),
            ("row 13", "%31%32%37.0.0.1", "127.0.0.1"),
            ("row 13", "127%2E1", "127.0.0.1"),
            ("row 13", "%E2%91%A0%E2%91%A1%E2%91%A6.1", "127.0.0.1"),
            ("row 14", "[::ffff:127.0.0.1]", "::ffff:127.0.0.1"),
            ("row 14", "[0000:0000:0000:0000:0000:FFFF:7F00:0001]", "::ffff:127.0.0.1"),
            ("row 14", "[0:0:0:0:0:0:0:1]", "::1"),
            ("row 14", "[0::0]", "::"),
        ]
    ],
)
def test_a_literal_in_any_spelling_is_read_as_the_address_it_is_and_refused(host: str, address: str) -> None:
    for authority in (host, f"{host}:", f"{host}:80", f"{host}:00080"):
        target = GUARD.examine(f"HTTP://{authority}/x")
        assert target.refusal is Reason.PRIVATE_ADDRESS
        assert ip_address(target.hostname) == ip_address(address)
        assert target.url == f"http://{in_url(target.hostname)}/x"


@pytest.mark.parametrize(
    ("host", "hostname"),
    [
        *(("134744072", "8.8.8.8"), ("0x08080808", "8.8.8.8")),
        *(("010.8.2056", "8.8.8.8"), ("８。８。８。８", "8.8.8.8")),
        *(("[2606:4700:0:0:0:0:0:ABCD]", "2606:4700::abcd"), ("[64:FF9B::8.8.8.8]", "64:ff9b::808:808")),
    ],
)
def test_a_public_literal_in_any_spelling_is_admitted_under_its_canonical_name(host: str, hostname: str) -> None:
    target = GUARD.examine(f"http://{host}/x")
    assert target == Target(f"http://{in_url(hostname)}/x", hostname, hostname)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost.",
        "ｌocalhost",
        "a.localhost",
        "a.b.localhost.",
        "loc%61lhost",
        "localhost。",
    ],
)
def test_row_12_localhost_and_all_under_it_are_refused_unless_the_loopback_is_opened(host: str) -> None:
    assert refusal(host) is Reason.PRIVATE_ADDRESS
    assert refusal(host, Guard(allowed_networks=["10.0.0.0/8"])) is Reason.PRIVATE_ADDRESS
    assert refusal(host, Guard(allowed_networks=["127.0.0.0/8"])) is None
    assert refusal(host, Guard(allowed_networks=["127.0.0.1"])) is None
    assert refusal(host, Guard(allowed_networks=["::1"])) is None


@pytest.mark.parametrize(
    "host", ["localhost.example.com", "notlocalhost", "localhost-1.com", "1.2.3.4.example.com", "0x7f.com"]
)
def test_a_name_that_only_resembles_a_local_one_is_admitted(host: str) -> None:
    assert GUARD.examine(f"https://{host}/x") == Target(f"https://{host}/x", host, host)


@pytest.mark.parametrize(
    "host",
    [
        *("256.1.1.1", "1.2.3.256", "1.2.3.4.5", "4294967296", "1.16777216", "09", "0x1g.0", "foo.0"),
        *("foo.0x1", "1..1", "1.2.3.08", "example.①", "0x7f.1.example.0x0", "1_0.0.0.1"),
        *("127.0.0.1..", "99999999999999999999"),
    ],
)
def test_a_numeric_last_label_that_makes_no_ipv4_address_is_invalid(host: str) -> None:
    assert GUARD.examine(f"http://{host}/x") == INVALID


def test_row_18_a_zone_is_invalid_in_an_address_and_ignored_where_it_is_dialled() -> None:
    for host in ("[fe80::1%eth0]", "[fe80::1%25eth0]", "[2606:4700::1%251]"):
        assert GUARD.examine(f"http://{host}/") == INVALID
    assert GUARD.check_address("fe80::1%eth0", 80) is Reason.PRIVATE_ADDRESS
    assert GUARD.check_address("2606:4700::1%2", 80) is None
    assert Guard(allowed_networks=["fe80::/10"]).check_address("fe80::1%eth0", 80) is None


@pytest.mark.parametrize(
    "text", ["", "localhost", "127.1", "1.2.3.4%eth0", "::1%", "8.8.8.8 ", "８.8.8.8", "/run/socket", "\0"]
)
def test_a_value_to_dial_that_is_no_address_is_refused(text: str) -> None:
    assert GUARD.check_address(text, 80) is Reason.PRIVATE_ADDRESS
    assert OPEN.check_address(text, 80) is Reason.PRIVATE_ADDRESS


# -- rows 20-22: addresses that two readers read differently -----------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("http://good@127.0.0.1/", "http://user:secret@example.com/", "http://@example.com/"),
        *("http://a%40b@example.com/", "https://example.com:80@127.0.0.1/", "http://u:p＠example.com/"),
    ],
)
def test_row_20_userinfo_is_refused_and_nothing_of_it_is_returned(url: str) -> None:
    assert GUARD.examine(url) == INVALID
    assert OPEN.examine(url) == INVALID


@pytest.mark.parametrize(
    "authority",
    [
        *("example.com\\@127.0.0.1", "example.com\\.evil.com", "\\127.0.0.1", "example.com%00.evil.com"),
        *("exam\x00ple.com", "exam\rple.com", "exam\nple.com", "exam\r\nple.com", "exam\tple.com"),
        *("127.0\t.0.1", "exam ple.com", " example.com", "example.com ", "exam\x7fple.com"),
        *("exam\x85ple.com", "exam%0d%0aple.com", "exam%20ple.com", "exam%09ple.com", "exam%2fple.com"),
        *("a%40b", "a%3a80", "a%5cb", "a%255cb", "％００.com", "exam\u3000ple.com", "exam\u00a0ple.com"),
        *("exam\u200bple.com", "exam\u00adple.com", "a／b", "a？b", "a＃b", "a：80", "\u2100.com", "%ff.com"),
        *("a%.com", "a%zz.com"),
    ],
)
def test_row_21_whatever_readers_strip_or_split_at_differently_makes_an_authority_invalid(authority: str) -> None:
    for url in (f"http://{authority}/x", f"https://{authority}:443?x", f"http://{authority}#x"):
        assert GUARD.examine(url) == INVALID


@pytest.mark.parametrize(
    "url",
    [
        *("", "/x", "//example.com/x", "example.com", "ftp://example.com/", "file:///etc/passwd"),
        *("gopher://127.0.0.1:6379/_x", "javascript:alert(1)", "http:example.com", "http:/example.com"),
        *("http:///example.com", "http:\\\\example.com\\x", "http://", "https://", "http:///", "http://?x"),
        *("http://#x", "http://:80/", "http://./", "http://../", "http://a..b/", "http://.a/", "http://a../"),
        *("\x0bhttp://example.com/", "\xa0http://example.com/", "ht\ntp://example.com/", "httpſ://example.com/"),
        *("http://a:b:c/", "http://[::1/", "http://::1/", "http://[::1]x/", "http://x[::1]/"),
        *("http://[[::1]]/", "http://[1.2.3.4]/", "http://[v1.x]/", "http://[]/", "http://[:::1]/"),
        *("http://[::ffff:127.1]/", "http://[::ffff:0177.0.0.1]/", "http://[1:2:3:4:5:6:7:8:9]/"),
        *("http://[::１]/", "http://[12345::]/", "view-source:http://a/", "http://exa$mple.com/"),
        *("http://a,b/", "http://a;b/", "http://*.example.com/", "http://a|b/", "http://a^b/", "http://<a>/"),
    ],
)
def test_anything_but_an_absolute_http_address_is_invalid(url: str) -> None:
    assert GUARD.examine(url) == INVALID


@pytest.mark.parametrize(
    "port", ["0", "00", "65536", "99999999999999999999", "-1", "+80", "8_0", "８０", "80 ", "8a", "0x50", "80%"]
)
def test_a_port_that_is_no_port_is_invalid(port: str) -> None:
    assert GUARD.examine(f"http://example.com:{port}/x") == INVALID


@pytest.mark.parametrize("char", [*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\ud800", "\udfff"], ids=ascii)
def test_a_control_character_or_lone_surrogate_makes_an_address_invalid_wherever_it_stands(char: str) -> None:
    around = [] if char in "\t\r\n" else [f"{char}http://a.b/", f"http://a.b/x{char}"]
    for url in (
        *around,
        f"http://{char}a.b/",
        f"http://a.b{char}/",
        f"http://a.b/?{char}#",
        f"http://a.b/#{char}x",
    ):
        assert GUARD.examine(url) == INVALID


@pytest.mark.parametrize("before", ["", " ", "\t", "\ufeff", "\r\n\t ", "\ufeff "])
@pytest.mark.parametrize("after", ["", " ", "\n", "\r\n", " \t ", "\ufeff"])
def test_blanks_and_a_byte_order_mark_around_an_address_are_trimmed(before: str, after: str) -> None:
    for address in ("https://a.b/x%2f?q=1", "http://a.b", "http://[2001:4860::8]:8080/é"):
        assert GUARD.examine(f"{before}{address}{after}") == GUARD.examine(address)
        assert GUARD.follow("http://c.d/", f"{before}{address}{after}") == GUARD.examine(address)
    assert GUARD.follow("http://c.d/x/", f"{before}y%2f{after}").url == "http://c.d/x/y%2f"


@pytest.mark.parametrize(
    ("host", "hostname"),
    [
        ("bücher.de", "xn--bcher-kva.de"),
        ("BÜCHER.de.", "xn--bcher-kva.de"),
        ("bu\u0308cher.de", "xn--bcher-kva.de"),
        ("b%C3%BCcher.de", "xn--bcher-kva.de"),
        ("XN--BCHER-KVA.de", "xn--bcher-kva.de"),
        ("аррӏе.com", "xn--80ak6aa92e.com"),
        ("gооgle.com", "xn--ggle-55da.com"),
        ("日本語。jp", "xn--wgv71a119e.jp"),
        ("ⓔⓧⓐⓜⓟⓛⓔ.com", "example.com"),
        ("ＥＸＡＭＰＬＥ．ＣＯＭ", "example.com"),
        ("☃.net", "xn--n3h.net"),
    ],
)
def test_row_22_a_name_in_any_script_has_one_canonical_form_which_is_punycode(host: str, hostname: str) -> None:
    target = GUARD.examine(f"https://{host}:443/x")
    assert target == Target(f"https://{hostname}/x", hostname, hostname)
    assert GUARD.examine(target.url) == target


@pytest.mark.parametrize("host", ["a\u0338\u202e.com", "\ufffd.com", "é" * 80 + ".com", "\u200d.com"])
def test_a_name_that_idna_refuses_is_invalid(host: str) -> None:
    assert GUARD.examine(f"http://{host}/") == INVALID


def test_a_name_may_be_as_long_as_the_dns_allows_and_no_longer() -> None:
    label = "a" * 63
    longest = ".".join([label, label, label, "a" * 61])
    assert refusal(longest) is None
    assert refusal(f"{longest}.") is None
    assert refusal(f"{longest}a") is Reason.INVALID_URL
    assert refusal(f"{label}a.com") is Reason.INVALID_URL
    assert refusal("é" * 10_000) is Reason.INVALID_URL


# -- rows 26-28, 30: redirects and ports -------------------------------------------------------------------------------

BASE = "https://store.example.com/a%2Fb/c%20d/e;f=%3f?q=1"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.1/", Reason.PRIVATE_ADDRESS),
        ("//169.254.169.254/latest/meta-data", Reason.PRIVATE_ADDRESS),
        ("//0x7f.1", Reason.PRIVATE_ADDRESS),
        ("https://[::ffff:10.0.0.1]/", Reason.PRIVATE_ADDRESS),
        ("HTTP://localhost/", Reason.PRIVATE_ADDRESS),
        ("http://user:secret@store.example.com/", Reason.INVALID_URL),
        ("//user@store.example.com/", Reason.INVALID_URL),
        ("//store.example.com\\@127.0.0.1/", Reason.INVALID_URL),
        ("///127.0.0.1/", Reason.INVALID_URL),
        ("http:/127.0.0.1/", Reason.INVALID_URL),
        ("https:x", Reason.INVALID_URL),
        ("http://store.example.com:22/", Reason.PORT_NOT_ALLOWED),
        ("//elsewhere.org/", Reason.HOST_NOT_ALLOWED),
    ],
)
def test_row_26_a_redirect_is_examined_like_any_address_and_keeps_its_own_reason(location: str, reason: Reason) -> None:
    hosts = ["*.example.com", "localhost", "127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1"]
    guard = Guard(allowed_hosts=hosts, allowed_ports=[80, 443])
    target = guard.follow(BASE, location)
    assert target.refusal is reason
    assert "secret" not in repr(target)


@pytest.mark.parametrize(
    "location",
    [
        *("file:///etc/passwd", "gopher://127.0.0.1:6379/_x", "ftp://example.com/x", "FILE:x", "data:,x"),
        *(
            "javascript:alert(1)",
            "dict://127.0.0.1:11211/",
            "ldap:x",
            "1:2",
            "127.0.0.1://a:80x/",
            "h2c://a/",
            "/x\x00",
            "/x\ry",
        ),
        *("\x0bhttp://a.b/", "/\ud800", "/" + "x" * 8192),
    ],
)
def test_row_27_a_redirect_that_leads_to_no_http_address_is_a_bad_redirect(location: str) -> None:
    assert GUARD.follow(BASE, location) == Target("", "", "", Reason.BAD_REDIRECT)


def test_a_redirect_from_an_address_that_cannot_be_read_is_a_bad_redirect() -> None:
    assert GUARD.follow("", "/x").refusal is Reason.BAD_REDIRECT
    assert GUARD.follow("ftp://a/", "http://example.com/").refusal is Reason.BAD_REDIRECT


def test_row_28_a_redirect_from_https_to_http_is_shown_as_what_it_is() -> None:
    assert GUARD.follow(BASE, "http://store.example.com/x").url == "http://store.example.com/x"


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("g", "https://store.example.com/a%2Fb/c%20d/g"),
        ("  g\t", "https://store.example.com/a%2Fb/c%20d/g"),
        ("./g%2f?y=%3D", "https://store.example.com/a%2Fb/c%20d/g%2f?y=%3D"),
        ("../g", "https://store.example.com/a%2Fb/g"),
        ("../../../g", "https://store.example.com/g"),
        ("/x/../y//z", "https://store.example.com/y//z"),
        ("/\\127.0.0.1/", "https://store.example.com/%5C127.0.0.1/"),
        ("\\\\127.0.0.1", "https://store.example.com/a%2Fb/c%20d/%5C%5C127.0.0.1"),
        ("/..//127.0.0.1/x", "https://store.example.com//127.0.0.1/x"),
        ("?z", "https://store.example.com/a%2Fb/c%20d/e;f=%3f?z"),
        ("#z", BASE),
        ("", BASE),
        ("//other.example.org", "https://other.example.org/"),
        ("http://other.example.org/%7e?a#b", "http://other.example.org/%7e?a"),
        ("/é?ü", "https://store.example.com/%C3%A9?%C3%BC"),
        ("g?u=http://a@b/", "https://store.example.com/a%2Fb/c%20d/g?u=http://a@b/"),
    ],
)
def test_a_location_is_resolved_against_the_present_address_without_touching_its_bytes(location: str, url: str) -> None:
    target = GUARD.follow(BASE, location)
    assert target.refusal is None
    assert target.url == url


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        *(("g", "/b/c/g"), ("./g", "/b/c/g"), ("g/", "/b/c/g/"), ("/g", "/g"), ("?y", "/b/c/d;p?y")),
        *(("g?y", "/b/c/g?y"), (";x", "/b/c/;x"), ("g;x?y#s", "/b/c/g;x?y"), ("", "/b/c/d;p?q")),
        *((".", "/b/c/"), ("./", "/b/c/"), ("..", "/b/"), ("../g", "/b/g"), ("../..", "/")),
        *(("../../g", "/g"), ("../../../g", "/g"), ("/./g", "/g"), ("/../g", "/g"), ("g.", "/b/c/g.")),
        *(("..g", "/b/c/..g"), ("./../g", "/b/g"), ("g;x=1/../y", "/b/c/y"), ("g?y/../x", "/b/c/g?y/../x")),
    ],
)
def test_the_examples_of_rfc_3986_5_4_resolve_as_the_rfc_says(reference: str, path: str) -> None:
    assert GUARD.follow("http://a/b/c/d;p?q", reference).url == f"http://a{path}"


@pytest.mark.parametrize("port", [22, 25, 6379, 8080, 1, 65535])
def test_row_30_a_port_that_is_not_allowed_is_refused_before_and_while_dialling(port: int) -> None:
    guard = Guard(allowed_ports=[80, 443])
    target = guard.examine(f"http://example.com:{port}/x")
    assert target == Target(
        f"http://example.com:{port}/x", "example.com", f"example.com:{port}", Reason.PORT_NOT_ALLOWED
    )
    assert guard.check_address("8.8.8.8", port) is Reason.PORT_NOT_ALLOWED
    assert guard.check_address("8.8.8.8", 443) is None
    assert GUARD.examine(f"http://example.com:{port}/x").refusal is None


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_order_of_reasons_is_invalid_then_port_then_host_then_address() -> None:
    guard = Guard(allowed_hosts=["example.com", "10.0.0.1"], allowed_ports=[80])
    assert guard.examine("http://u@10.0.0.2:22/").refusal is Reason.INVALID_URL
    assert guard.examine("http://10.0.0.2:22/").refusal is Reason.PORT_NOT_ALLOWED
    assert guard.examine("http://10.0.0.2/").refusal is Reason.HOST_NOT_ALLOWED
    assert guard.examine("http://10.0.0.1/").refusal is Reason.PRIVATE_ADDRESS
    assert guard.examine("https://example.com:80/").refusal is None


@pytest.mark.parametrize(
    ("pattern", "admitted", "refused"),
    [
        ("example.com", "example.com", "a.example.com"),
        ("Example.COM.", "EXAMPLE.com.", "example.com.evil.org"),
        ("*.example.com", "a.b.example.com", "example.com"),
        ("*.example.com", "a.example.com.", "evilexample.com"),
        ("*.bücher.de", "a.xn--bcher-kva.de", "a.bucher.de"),
        ("8.8.8.8", "0x08080808", "8.8.4.4"),
        ("2606:4700::1", "[2606:4700:0::1]", "[2606:4700::2]"),
        ("[2606:4700::1]", "[2606:4700::1]", "2606.example.com"),
    ],
)
def test_an_allowed_host_matches_by_its_canonical_form(pattern: str, admitted: str, refused: str) -> None:
    guard = Guard(allowed_hosts=[pattern])
    assert refusal(admitted, guard) is None
    assert refusal(refused, guard) is Reason.HOST_NOT_ALLOWED


def test_an_allowed_host_opens_no_private_address() -> None:
    guard = Guard(allowed_hosts=["10.0.0.1", "localhost"])
    assert refusal("10.0.0.1", guard) is Reason.PRIVATE_ADDRESS
    assert refusal("localhost", guard) is Reason.PRIVATE_ADDRESS


@pytest.mark.parametrize(
    ("network", "opened", "closed"),
    [
        (
            "10.1.0.0/16",
            ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203", "2002:a01:203::1", "::10.1.2.3"],
            ["10.2.0.1"],
        ),
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2", "::1", "0.0.0.0"]),
        ("0.0.0.0/8", ["0.0.0.0", "0.0.0.1", "::ffff:0.0.0.1"], ["::1", "::"]),
        ("::1", ["::1"], ["127.0.0.1", "::"]),
        ("fd00::/8", ["fd12::1"], ["fc00::1"]),
        ("2001::/32", ["2001::1"], ["2001:1::1"]),
        ("2002::/16", ["2002:7f00:1::1"], ["127.0.0.1"]),
        ("64:ff9b:1::/48", ["64:ff9b:1::a00:1"], ["10.0.0.1"]),
        ("::ffff:10.0.0.0/104", ["::ffff:10.0.0.1"], ["10.0.0.1"]),
    ],
)
def test_a_hole_opens_what_it_holds_as_dialled_or_as_carried_and_nothing_else(
    network: str, opened: list[str], closed: list[str]
) -> None:
    guard = Guard(allowed_networks=[network])
    for address in opened:
        assert guard.check_address(address, 80) is None
        assert refusal(in_url(address), guard) is None
    for address in closed:
        assert guard.check_address(address, 80) is Reason.PRIVATE_ADDRESS
        assert refusal(in_url(address), guard) is Reason.PRIVATE_ADDRESS


@pytest.mark.parametrize(
    "host",
    [
        *("", "*", "*.", "*.*.com", "a*.com", "a b", "a:80", "http://a/", "a/b", "*.1.2.3.4", "1.2.3.256"),
        *("u@a", "[::1", "*.[::1]", "a\n.com", "x" * 64),
    ],
)
def test_an_allowed_host_that_is_none_is_named_in_one_line(host: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(host))) as raised:
        Guard(allowed_hosts=["example.com", host])
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "network", ["", "10.0.0.1/8", "10.0.0.0/33", "example.com", "10.0.0.0-10.0.0.9", "fe80::%eth0/64", "a\nb"]
)
def test_an_allowed_network_that_is_none_is_named_in_one_line(network: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(network))) as raised:
        Guard(allowed_networks=["10.0.0.0/8", network])
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("port", [0, -1, 65536, True])
def test_an_allowed_port_that_is_none_is_named_in_one_line(port: int) -> None:
    with pytest.raises(ValueError, match=f"^{port} is not a port"):
        Guard(allowed_ports=[80, port])


def test_a_guard_is_a_value_that_cannot_be_changed() -> None:
    guard = Guard(["*.Example.com"], ["10.0.0.0/8", ip_network("fd00::/8")], [443, 80])
    assert guard == Guard(["*.example.com"], ["10.0.0.0/8", "fd00::/8"], [80, 443, 80])
    assert hash(guard) == hash(Guard(["*.example.com"], ["10.0.0.0/8", "fd00::/8"], [80, 443]))
    assert guard != GUARD
    assert guard != "guard"
    assert pickle.loads(pickle.dumps(guard)) == guard
    assert repr(guard) == "Guard(['*.example.com'], ['10.0.0.0/8', 'fd00::/8'], [80, 443])"
    with pytest.raises(AttributeError, match="allowed_ports"):
        guard.allowed_ports = frozenset()
    with pytest.raises(AttributeError, match="allowed_hosts"):
        del guard.allowed_hosts


def test_the_guard_is_light_enough_for_a_prober() -> None:
    heavy = "{'asyncio', 'aiohttp', 'pydantic', 'ssl', 'socket'} & set(sys.modules)"
    program = f"import sys, notify_server.verify.guard; print({heavy})"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


# -- the address handed on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "canonical", "host"),
    [
        ("https://Test-OSS.example.com", "https://test-oss.example.com/", "test-oss.example.com"),
        ("HTTPS://a.b:443/", "https://a.b/", "a.b"),
        ("http://a.b:443/x", "http://a.b:443/x", "a.b:443"),
        ("https://a.b.:80?x", "https://a.b:80/?x", "a.b:80"),
        ("http://[2606:4700::1]:80/x", "http://[2606:4700::1]/x", "2606:4700::1"),
        ("http://[2606:4700::1]:81/x", "http://[2606:4700::1]:81/x", "[2606:4700::1]:81"),
        ("http://my_bucket.a.b/x#frag", "http://my_bucket.a.b/x", "my_bucket.a.b"),
        ("http://a.b#frag", "http://a.b/", "a.b"),
        ("http://a.b/x#f?g#h\u2028", "http://a.b/x", "a.b"),
    ],
)
def test_the_origin_is_canonical_and_off_the_default_port_counted_apart(url: str, canonical: str, host: str) -> None:
    target = GUARD.examine(url)
    assert (target.url, target.host, target.refusal) == (canonical, host, None)


@pytest.mark.parametrize(
    ("given_rest", "sent"),
    [
        ("/a/../b/./c//d/", "/a/../b/./c//d/"),
        ("/%7e%2F%2e%2E/?a=%41%zz", "/%7e%2F%2e%2E/?a=%41%25zz"),
        ("/o.JPG!style0.jpg?Signature=a%2Bb%3D&x=a+b;c", "/o.JPG!style0.jpg?Signature=a%2Bb%3D&x=a+b;c"),
        ("/a b?c d #", "/a%20b?c%20d%20"),
        ("/测试?é=𝟏", "/%E6%B5%8B%E8%AF%95?%C3%A9=%F0%9D%9F%8F"),
        ("/?a[]=1&u=http://u@h:1/", "/?a[]=1&u=http://u@h:1/"),
        ('/"<>\\^`{|}', "/%22%3C%3E%5C%5E%60%7B%7C%7D"),
        ("/%", "/%25"),
        ("/%%41%4", "/%25%41%254"),
        ("/??", "/??"),
        ("?", "/?"),
        ("/\u202e\u2028", "/%E2%80%AE%E2%80%A8"),
    ],
)
def test_path_and_query_are_kept_but_for_what_may_not_stand_raw(given_rest: str, sent: str) -> None:
    assert GUARD.examine(f"https://a.b{given_rest}").url == f"https://a.b{sent}"


def test_an_address_is_limited_in_length_as_given_and_as_sent() -> None:
    longest = "http://a.b/" + "x" * (8192 - len("http://a.b/"))
    assert GUARD.examine(longest).url == longest
    assert GUARD.examine(longest + "x") == INVALID
    assert GUARD.examine("http://a.b/" + " " * 3000 + "x") == INVALID
    assert GUARD.examine(f"http://{'a' * 2000}/") == INVALID


# -- harmless ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:secret@example.com/x", "http://example.com/x"),
        ("http://a@b@example.com/x@y", "http://example.com/x@y"),
        ("http://user:se/cr?e#t@example.com/x", "http://example.com/x"),
        ("http:user:secret@example.com", "http:example.com"),
        ("http:\\\\user:secret@example.com", "http:\\\\example.com"),
        ("user:secret@example.com", "example.com"),
        ("http://user:secret\\@example.com/", "http://example.com/"),
        ("\x00 http://user:secret@example.com/", "%00 http://example.com/"),
        ("http://example.com:80/a:b@c", "http://example.com:80/a:b@c"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("http://a/\x1b[31m\r\n\x85\u202e\ud800", "http://a/%1B[31m%0D%0A%C2%85%E2%80%AE%ED%A0%80"),
        ("http://例え.jp/é", "http://例え.jp/é"),
        ("", ""),
    ],
)
def test_a_harmless_form_has_no_userinfo_and_only_printable_characters(url: str, shown: str) -> None:
    assert printable_url(url) == shown


def test_a_harmless_form_is_cut_to_300_characters_after_a_long_password_is_gone() -> None:
    assert (
        printable_url("http://u:" + "s" * 1000 + "@example.com/" + "\n" * 400)
        == ("http://example.com/" + "%0A" * 300)[:300]
    )


@pytest.mark.timeout(60)  # Reading one of them in quadratic time would take minutes.
def test_a_printable_form_costs_no_more_than_the_text_is_long() -> None:
    for junk in (":x", "\\", "/", "a:", "@", ":1", ":/", "http:", "a"):
        assert len(printable_url("http://" + junk * 100_000)) <= 300


# -- properties --------------------------------------------------------------------------------------------------------

ipv4 = st.one_of(
    st.integers(0, 2**32 - 1).map(IPv4Address),
    st.sampled_from([ip_network(prefix) for prefix, _ in SPECIAL_PURPOSE if ":" not in prefix]).flatmap(
        lambda network: st.sampled_from(
            [IPv4Address((int(network[0]) + offset) % 2**32) for offset in (-1, 0, network.num_addresses)]
        )
    ),
)


def spellings(address: IPv4Address) -> list[str]:
    value, (a, b, c, d) = int(address), address.packed
    digits = str.maketrans("0123456789.", "⓪①②③④⑤⑥⑦⑧⑨。")
    return [
        *(str(value), f"{value:#x}", f"{value:#X}", f"0{value:o}", f"{a}.{value & 0xFFFFFF}", f"{a}.{b}.{c << 8 | d}"),
        *(f"{a:#x}.{b:#x}.{c:#x}.{d:#x}", f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"{a}.0{b:o}.{c << 8 | d:#x}", f"{address}."),
        *(str(address).translate(digits), "".join(f"%{ord(char):02x}" for char in str(address))),
        *(f"[::ffff:{address}]", f"[::ffff:{value >> 16:x}:{value & 0xFFFF:x}]", f"[64:ff9b::{address}]"),
    ]


@few
@given(ipv4)
def test_every_spelling_of_an_ipv4_address_gets_the_verdict_of_the_dotted_form(address: IPv4Address) -> None:
    verdict = GUARD.check_address(str(address), 80)
    assert refusal(str(address)) is verdict
    for spelling in spellings(address):
        target = GUARD.examine(f"http://{spelling}/")
        assert target.refusal is verdict, spelling
        carried = ip_address(target.hostname)
        assert int(carried) & 0xFFFFFFFF == int(address)
    for form in (f"::ffff:{address}", f"64:ff9b::{address}"):
        assert GUARD.check_address(form, 80) is verdict
    for form in (f"::{address}", f"64:ff9b:1::{address}", f"2002:{int(address) >> 16:x}:{int(address) & 0xFFFF:x}::1"):
        assert GUARD.check_address(form, 80) is Reason.PRIVATE_ADDRESS


fragments = st.sampled_from(
    [
        *(*"/?#@:[]\\%.", "http://", "https://", "//", "127.0.0.1", "0x7f", "①", "。", "::1", "[::ffff:"),
        *("localhost", "example.com", "%00", "%2e", "%31", " ", "\t", "\r\n", "\x00", "é", "ß", "\u200b"),
        *("\ud800", "xn--", ":80", ":0", "user:pw@", "0", "1."),
    ]
)
tricky = st.lists(st.one_of(fragments, st.text(max_size=4)), max_size=12).map("".join)
any_url = st.one_of(st.text(), tricky, tricky.map("http://{}".format), tricky.map("https://a.example{}".format))


def promises_hold(target: Target) -> None:
    if target.refusal in (Reason.INVALID_URL, Reason.BAD_REDIRECT):
        assert target == Target("", "", "", target.refusal)
        return
    assert re.fullmatch(r"https?://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[1-9][0-9]*)?/[!-\"$-~]*", target.url)
    if target.refusal is None:
        assert GUARD.examine(target.url) == target
        assert not f".{target.hostname}".endswith(".localhost")
        try:
            ip_address(target.hostname)
        except ValueError:
            assert re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", target.hostname)
        else:
            assert GUARD.check_address(target.hostname, 80) is None


@few
@given(any_url)
def test_any_text_is_examined_without_raising_and_admits_no_refused_literal(url: str) -> None:
    promises_hold(GUARD.examine(url))


@few
@given(any_url, any_url)
def test_any_location_is_followed_without_raising_and_admits_no_refused_literal(url: str, location: str) -> None:
    promises_hold(GUARD.follow(url, location))
    promises_hold(GUARD.follow(BASE, location))


@few
@given(any_url)
def test_a_harmless_form_is_always_printable_and_short(url: str) -> None:
    shown = printable_url(url)
    assert shown.isprintable()
    assert len(shown) <= 300


@few
@given(st.from_regex(r"/([!$&-;=?-Z\[\]_a-z~]|%[0-9a-fA-F]{2})*", fullmatch=True))
def test_path_and_query_of_an_ascii_address_survive_byte_for_byte(rest: str) -> None:
    assert GUARD.examine(f"https://store.example.com{rest}").url == f"https://store.example.com{rest}"


@few
@given(st.integers(0, 2**128 - 1).map(IPv6Address), st.sampled_from(["compressed", "exploded", "upper"]))
def test_every_spelling_of_an_ipv6_address_gets_the_same_verdict(address: IPv6Address, form: str) -> None:
    text = {"compressed": address.compressed, "exploded": address.exploded, "upper": address.exploded.upper()}[form]
    target = GUARD.examine(f"http://[{text}]/")
    assert target.hostname == address.compressed
    assert target.refusal is GUARD.check_address(text, 80) is GUARD.check_address(address.compressed, 80)


# -- libcurl reads the same --------------------------------------------------------------------------------------------


def dialled(url: str) -> list[tuple[str, int]]:
    """The socket addresses that libcurl would have dialled for an address; it is given no socket."""
    asked: list[tuple[str, int]] = []

    def no_socket(_purpose: int, address: tuple[int, int, int, tuple[str, int]]) -> int:
        asked.append((address[3][0], address[3][1]))
        return int(pycurl.SOCKET_BAD)

    curl = pycurl.Curl()
    try:
        curl.setopt(pycurl.URL, url)
        curl.setopt(pycurl.PROXY, "")
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, no_socket)
        with pytest.raises(pycurl.error):
            curl.perform()
    finally:
        curl.close()
    return asked


AUTHORITIES = [
    *(
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "017700000001",
        "127.1",
        "0",
        "0x7f.1",
        "127.0.0.1.",
        "0X7F.1",
    ),
    *(
        "8.8.8.8",
        "134744072",
        "010.8.2056",
        "8.8.8.8:81",
        "8.8.8.8:",
        "8.8.8.8:0080",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "８.8.8.8",
    ),
    *(
        "%31%32%37.0.0.1",
        "127%2e1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[::1]:8080",
    ),
    *("[64:ff9b::7f00:1]", "[2002:7f00:1::1]", "[2606:4700:0:0::ABCD]:443", "[FE80::1]", "[0:0:0:0:0:FFFF:8.8.8.8]"),
    *("255.255.255.255", "4294967295", "1.2.65535", "1.16777215", "0x", "00000000000", "0xffffffff", "[fd00:ec2::254]"),
]


@pytest.mark.parametrize("authority", AUTHORITIES, ids=ascii)
def test_libcurl_dials_the_address_that_the_guard_has_read(authority: str) -> None:
    for scheme, default in (("http", 80), ("https", 443)):
        target = OPEN.examine(f"{scheme}://{authority}/x?y")
        assert target.refusal is None
        port = target.host.rpartition("]")[2].rpartition(":")[2] if target.host != target.hostname else default
        [(address, dialled_port)] = dialled(target.url)
        assert ip_address(address) == ip_address(target.hostname)
        assert dialled_port == int(port)
        assert OPEN.check_address(address, dialled_port) is None


@pytest.mark.parametrize("authority", [each for each in AUTHORITIES if each.isascii() and each != "0x"])
def test_libcurl_and_the_guard_read_a_numeric_authority_alike_even_as_it_was_given(authority: str) -> None:
    # "0x" is left out: libcurl takes it for a name, and would look it up.
    url = f"http://{authority}/"
    [(address, _)] = dialled(url)
    assert ip_address(address) == ip_address(OPEN.examine(url).hostname)


@settings(max_examples=40, deadline=None)
@given(ipv4)
def test_libcurl_dials_any_ipv4_address_as_the_guard_reads_it(address: IPv4Address) -> None:
    for spelling in spellings(address):
        [(seen, port)] = dialled(OPEN.examine(f"http://{spelling}/").url)
        assert int(ip_address(seen)) & 0xFFFFFFFF == int(address)
        assert port == 80
