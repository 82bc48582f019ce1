from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from notify_server.config import Config, StatusRange, VerifyConfig, load_config, version
from notify_server.config.values import duration
from notify_server.errors import ConfigError
from notify_server.verify.guard import Guard

NOT_A_DURATION = 'is not a duration: write a number of seconds, or "30s", "5m", "2h"'


Load = Callable[..., Config]
Problems = Callable[..., list[str]]


@pytest.fixture(scope="module")
def key() -> str:
    public = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    return base64.b64encode(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(toml: str = "", **environ: str) -> Config:
        path = tmp_path / "some.toml"
        path.write_text(toml, encoding="utf-8")
        return load_config(path, environ={f"NOTIFY_SERVER__{name}": value for name, value in environ.items()})

    return load


@pytest.fixture
def problems(load: Load) -> Problems:
    def problems(toml: str = "", **environ: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(toml, **environ)
        assert all(line.isprintable() for line in caught.value.problems)
        return list(caught.value.problems)

    return problems


def value_of(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def toml_of(key: str, literal: str) -> str:
    section, name = key.split(".")
    return f"[{section}]\n{name} = {literal}\n"


# --- durations ---


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0), (1.5, 1.5), ("0", 0), ("30", 30), ("250ms", 0.25), ("30s", 30), ("5m", 300), ("2h", 7200),
        ("10d", 864_000), ("1.5h", 5400), (" 5m ", 300), ("36500d", 3_153_600_000),
    ],
)  # fmt: skip
def test_durations_are_numbers_or_text_with_a_unit(given: object, seconds: float) -> None:
    assert duration(given) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "given",
    [
        -1, -0.001, float("nan"), True, None, [], {}, "", "s", "soon", "5 minutes", "-5s", "+5s", "5 s", "1e3", "5M",
        "5m30s", "0x10", "٣s", "nan", "inf", "1_000",
    ],
)  # fmt: skip
def test_an_invalid_duration_is_refused_in_plain_words(given: object) -> None:
    with pytest.raises(ValueError, match="is not a duration: write a number of seconds, or"):
        duration(given)


@pytest.mark.parametrize("given", [float("inf"), 10**400, "36501d", "9" * 400 + "d"])
def test_a_duration_beyond_a_century_is_too_long(given: object) -> None:
    with pytest.raises(ValueError, match="is too long"):
        duration(given)


@given(st.integers(0, 3_000_000), st.sampled_from([("ms", 0.001), ("s", 1), ("m", 60), ("h", 3600), ("", 1)]))
def test_a_number_with_a_unit_is_that_many_of_the_unit(number: int, unit: tuple[str, float]) -> None:
    name, seconds = unit
    if number * seconds <= 36_500 * 86_400:
        assert duration(f"{number}{name}") == pytest.approx(number * seconds)


@given(st.floats(0, 3e9, allow_nan=False))
def test_a_number_of_seconds_is_itself(seconds: float) -> None:
    assert duration(seconds) == seconds


@given(st.one_of(st.text(), st.floats(), st.integers(), st.booleans(), st.none(), st.lists(st.text())))
def test_anything_at_all_is_a_finite_duration_or_refused_on_one_printable_line(value: object) -> None:
    try:
        seconds = duration(value)
    except ValueError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 200
    else:
        assert 0 <= seconds <= 36_500 * 86_400


# --- every rule, both sides ---


@pytest.mark.parametrize(
    ("key", "literal", "value"),
    [
        ("server.host", '"::"', "::"),
        ("server.port", "0", 0),
        ("server.port", "65535", 65535),
        ("server.port", '"8081"', 8081),
        ("server.callback_path", '"/hooks/files-1.0/"', "/hooks/files-1.0/"),
        ("server.callback_path", '"/apiary"', "/apiary"),
        ("server.body_limit_bytes", "1024", 1024),
        ("server.body_limit_bytes", "1073741824", 2**30),
        ("server.shutdown_grace", "0.1", 0.1),
        ("server.max_connections", "1", 1),
        ("server.trusted_proxies", '["10.0.0.0/8", "::1"]', (ip_network("10.0.0.0/8"), ip_network("::1"))),
        ("auth.callback_networks", '["192.0.2.7"]', (ip_network("192.0.2.7/32"),)),
        ("auth.nonce_ttl", '"30s"', 30),
        ("ack.status", "200", 200),
        ("ack.status", "299", 299),
        ("ack.content_type", '"text/plain; charset=utf-8"', "text/plain; charset=utf-8"),
        ("ack.body", '\'{"id":"{request_id}","n":{}}\'', '{"id":"{request_id}","n":{}}'),
        ("ack.body", '""', ""),
        ("contract.max_files", "1", 1),
        ("store.url", '"sqlite:////var/lib/n.db"', "sqlite:////var/lib/n.db"),
        ("verify.processes", "1", 1),
        ("verify.processes", "64", 64),
        ("verify.concurrency", "1", 1),
        ("verify.concurrency", "400", 400),
        ("verify.per_host_concurrency", "1", 1),
        ("verify.per_host_interval", '"250ms"', 0.25),
        ("verify.methods", '["GET"]', ("GET",)),
        ("verify.methods", '["GET", "HEAD"]', ("GET", "HEAD")),
        ("verify.accept_status", '["204"]', (StatusRange(204, 204),)),
        ("verify.accept_status", '[204, "200-200"]', (StatusRange(204, 204), StatusRange(200, 200))),
        ("verify.max_redirects", "0", 0),
        ("verify.retry_schedule", "[]", ()),
        ("verify.retry_schedule", f"[{'1,' * 50}]", (1,) * 50),
        ("verify.jitter", "0", 0),
        ("verify.jitter", "0.99", 0.99),
        ("verify.backlog_limit", "1", 1),
        ("verify.allowed_hosts", '["Example.COM.", "*.example.com"]', ("example.com", "*.example.com")),
        ("verify.allowed_hosts", '["*.例子.com", "[::1]", "10.0.0.1"]', ("*.xn--fsqu00a.com", "::1", "10.0.0.1")),
        ("verify.allowed_networks", '["fd00::/8"]', (ip_network("fd00::/8"),)),
        ("verify.allowed_ports", "[]", ()),
        ("verify.allowed_ports", "[1, 65535]", (1, 65535)),
        ("verify.user_agent", '"checker (ops@example.com)"', "checker (ops@example.com)"),
        ("retention.completed", '"1d"', 86_400),
        ("log.format", '"json"', "json"),
        ("log.level", '"debug"', "debug"),
    ],
)
def test_a_value_within_the_rules_is_taken(load: Load, key: str, literal: str, value: object) -> None:
    assert value_of(load(toml_of(key, literal)), key) == value


@pytest.mark.parametrize(
    ("key", "literal", "problem"),
    [
        ("server.host", '""', 'must be an address or a name, like "127.0.0.1", not ""'),
        ("server.host", '"a b"', 'must be an address or a name, like "127.0.0.1", not "a b"'),
        ("server.port", '"eighty"', 'must be a whole number, not "eighty"'),
        ("server.port", "true", "must be a whole number, not true"),
        ("server.port", "80.0", "must be a whole number, not 80.0"),
        ("server.port", "[80]", "must be a whole number, not a list"),
        ("server.port", "2024-01-01", 'must be a whole number, not "2024-01-01"'),
        ("server.port", "-1", "must be from 0 to 65535, not -1"),
        ("server.port", "65536", "must be from 0 to 65535, not 65536"),
        ("server.body_limit_bytes", "1023", "must be from 1024 to 1073741824, not 1023"),
        ("server.body_limit_bytes", "1073741825", "must be from 1024 to 1073741824, not 1073741825"),
        ("server.shutdown_grace", "0", "must be more than 0"),
        ("server.header_timeout", '"0s"', "must be more than 0"),
        ("server.body_timeout", '"5 minutes"', f'"5 minutes" {NOT_A_DURATION}'),
        ("server.max_connections", "0", "must be at least 1, not 0"),
        ("server.roles", "[]", "must have at least one entry, and none twice"),
        ("server.roles", '["probes", "probes"]', "must have at least one entry, and none twice"),
        ("server.roles", '"probes"', 'must be a list, like ["a", "b"]'),
        ("auth.nonce_ttl", "10", "must be at least timestamp_window (30s), not 10s"),
        ("auth.timestamp_window", "0", "must be more than 0"),
        ("auth.signature", '"on"', 'must be "off", "optional" or "required", not "on"'),
        ("ack.status", "199", "must be from 200 to 299, not 199"),
        ("ack.status", "300", "must be from 200 to 299, not 300"),
        ("ack.content_type", r'"a\r\nb: c"', r'must be printable ASCII, not blank at its ends, not "a\r\nb: c"'),
        ("ack.content_type", '""', 'must be printable ASCII, not blank at its ends, not ""'),
        ("ack.body", "5", "must be UTF-8 text"),
        ("contract.max_files", "0", "must be at least 1, not 0"),
        ("verify.processes", "0", "must be from 1 to 64, not 0"),
        ("verify.processes", "65", "must be from 1 to 64, not 65"),
        ("verify.concurrency", "0", "must be at least 1, not 0"),
        ("verify.concurrency", "401", "401 is more than 400 for each of verify.processes = 1: raise verify.processes, "
                                      "because each prober waits with select()"),
        ("verify.per_host_concurrency", "0", "must be at least 1, not 0"),
        ("verify.per_host_interval", "-1", f"-1 {NOT_A_DURATION}"),
        ("verify.timeout", "nan", f"NaN {NOT_A_DURATION}"),
        ("verify.connect_timeout", "0", "must be more than 0"),
        ("verify.methods", "[]", "must have at least one entry, and none twice"),
        ("verify.methods", '["GET", "GET"]', "must have at least one entry, and none twice"),
        ("verify.accept_status", "[]", "must have at least one entry, and none twice"),
        ("verify.max_redirects", "-1", "must be from 0 to 50, not -1"),
        ("verify.retry_schedule", '"5s"', 'must be a list, like ["a", "b"]'),
        ("verify.retry_schedule", f"[{'1,' * 51}]", "must have at most 50 entries, not 51"),
        ("verify.jitter", "1", "must be a number from 0 to below 1, not 1"),
        ("verify.jitter", "-0.1", "must be a number from 0 to below 1, not -0.1"),
        ("verify.jitter", "nan", "must be a number from 0 to below 1, not NaN"),
        ("verify.jitter", "true", "must be a number from 0 to below 1, not true"),
        ("verify.jitter", '"much"', 'must be a number from 0 to below 1, not "much"'),
        ("verify.jitter", "[]", "must be a number from 0 to below 1, not a list"),
        ("verify.backlog_limit", "0", "must be at least 1, not 0"),
        ("verify.user_agent", r'"\u001b[31m"', r'must be printable ASCII, not blank at its ends, not "\u001b[31m"'),
        ("verify.hosts", "5", "must be a table"),
        ("retention.completed", "0", "must be more than 0"),
        ("log.format", '"xml"', 'must be "console" or "json", not "xml"'),
        ("log.level", "7", 'must be "debug", "info", "warning" or "error", not 7'),
    ],
)  # fmt: skip
def test_a_value_against_the_rules_is_refused_by_its_name(
    problems: Problems, key: str, literal: str, problem: str
) -> None:
    section, name = key.split(".")
    assert problems(toml_of(key, literal)) == [f"[{section}] {name}: {problem}"]


@pytest.mark.parametrize(
    ("key", "literal", "problem"),
    [
        ("verify.retry_schedule", '["5s", 1, "soon"]', f'[2]: "soon" {NOT_A_DURATION}'),
        ("verify.methods", '["HEAD", "POST"]', '[1]: must be "HEAD" or "GET", not "POST"'),
        ("verify.accept_status", '["200-99"]', '[0]: "200-99" is not a status: write "204", or "200-299"'),
        ("verify.accept_status", '["299-200"]', '[0]: "299-200" is not a status: write "204", or "200-299"'),
        ("verify.accept_status", "[600]", '[0]: 600 is not a status: write "204", or "200-299"'),
        ("verify.accept_status", "[true]", '[0]: true is not a status: write "204", or "200-299"'),
        ("verify.allowed_ports", "[80, 0]", "[1]: must be from 1 to 65535, not 0"),
        ("verify.allowed_networks", '["10.0.0.5/8"]', '[0]: "10.0.0.5/8" is not a network: write "10.0.0.0/8"'),
        ("auth.callback_networks", '["here"]',
         '[0]: "here" is not a network: write "10.0.0.0/8", "192.0.2.7" or "fd00::/8"'),
        ("server.trusted_proxies", "[5]", "[0]: must be UTF-8 text"),
        ("server.roles", '["probes", "probe"]', '[1]: must be "callbacks" or "probes", not "probe"'),
        ("auth.platform_keys", "[5]", "[0]: must be UTF-8 text"),
    ],
)  # fmt: skip
def test_a_wrong_entry_of_a_list_is_named_by_its_place(
    problems: Problems, key: str, literal: str, problem: str
) -> None:
    section, name = key.split(".")
    assert problems(toml_of(key, literal)) == [f"[{section}] {name}{problem}"]


@pytest.mark.parametrize(
    ("spelled", "host"),
    [("0x7f000001", "127.0.0.1"), ("1.2.3", "1.2.0.3"), ("0177.1", "127.0.0.1"), ("①②⑦.0.0.1", "127.0.0.1"),
     ("FILES.Example.COM.", "files.example.com"), ("*.例子.测试", "*.xn--fsqu00a.xn--0zwm56d"), ("[0:0::1]", "::1")],
)  # fmt: skip
def test_a_pattern_is_spelled_as_the_guard_spells_the_host(load: Load, spelled: str, host: str) -> None:
    verify = load(
        f"[verify]\nallowed_hosts = [{json.dumps(spelled)}]\n[verify.hosts.{json.dumps(spelled)}]\ntimeout = 3"
    ).verify
    assert verify.allowed_hosts == (host,)
    assert Guard(verify.allowed_hosts).allowed_hosts == (host,)
    assert verify.for_host(host.replace("*", "a")).timeout == 3


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "*.", "a..b", "a.*.b", "**.b", "https://example.com", "a b", "a/b", "a:80", "1.2.3.256", "*.10.0.0.1",
     "files.0x1f", "*.1.2.3.0x4", "a.0x", "*.0x7f000001", "1.2.3.4.5", "[::1", "*.[::1]", "x" * 64,
     "a." * 127 + "com", "例 子.com"],
)  # fmt: skip
def test_an_invalid_host_is_no_pattern_either(problems: Problems, pattern: str) -> None:
    [problem] = problems(toml_of("verify.allowed_hosts", json.dumps([pattern])))
    assert problem.startswith("[verify] allowed_hosts[0]: ")
    assert problem.endswith('is not a host: write "example.com", or "*.example.com" for its subdomains')


@pytest.mark.parametrize(
    "path",
    ["/", "", "notify", "/a?b", "/a#b", "/a b", "/a\tb", "//a", "/a//b", "/../a", "/a/.", "/a%20b", "/{id}", "/通知"],
)
def test_a_callback_path_is_a_plain_absolute_path(problems: Problems, path: str) -> None:
    [problem] = problems(toml_of("server.callback_path", json.dumps(path)))
    assert problem.startswith(
        '[server] callback_path: must be a plain path like "/notify", without query, fragment or blanks, not "'
    )


@pytest.mark.parametrize("own", ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/api"])
def test_a_callback_path_is_none_of_the_servers_own(problems: Problems, own: str) -> None:
    for path in (own, f"{own}/", f"{own}/v1/files"):
        [problem] = problems(toml_of("server.callback_path", f'"{path}"'))
        assert problem == f'[server] callback_path: "{path}" is taken: {own} is the server\'s own'


def test_concurrency_beyond_one_prober_is_taken_with_more_of_them(load: Load) -> None:
    assert load("[verify]\nconcurrency = 800\nprocesses = 2").verify.concurrency == 800


def test_a_certificate_and_its_key_go_together(load: Load, problems: Problems, tmp_path: Path) -> None:
    certificate, private = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate.touch()
    private.touch()
    both = f"[server]\nssl_certificate = '{certificate}'\nssl_key = '{private}'"
    assert (load(both).server.ssl_certificate, load(both).server.ssl_key) == (certificate, private)
    alone = ["[server] ssl_key: ssl_certificate and ssl_key go together: set both or neither"]
    assert problems(f"[server]\nssl_certificate = '{certificate}'") == alone
    assert problems(f"[server]\nssl_key = '{private}'") == alone


def test_files_have_to_be_there_and_readable(
    load: Load, problems: Problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = Path("missing.pem")
    assert problems(f"[verify]\nca_file = '{missing}'") == [
        f'[verify] ca_file: cannot read "{missing}": No such file or directory'
    ]
    assert problems("[verify]\nca_file = '.'") == ['[verify] ca_file: cannot read ".": Is a directory']
    # The key is not called missing because of a certificate that is only unreadable.
    assert problems(f"[server]\nssl_certificate = '{missing}'") == [
        f'[server] ssl_certificate: cannot read "{missing}": No such file or directory'
    ]
    missing.touch()
    assert load(f"[verify]\nca_file = '{missing}'").verify.ca_file == missing


@pytest.mark.parametrize("signature", ["optional", "required"])
def test_checking_signatures_takes_a_key(load: Load, problems: Problems, key: str, signature: str) -> None:
    toml = f'[auth]\nsignature = "{signature}"\n'
    assert problems(toml) == [
        f'[auth] platform_keys: auth.platform_keys needs at least one key, because auth.signature is "{signature}"'
    ]
    [loaded] = load(f'{toml}platform_keys = ["{key}"]').auth.platform_keys
    assert len(loaded.fingerprint) == 16


def test_a_server_that_does_not_do_both_shares_a_database(load: Load, problems: Problems) -> None:
    alone = (
        "must be both with a file of SQLite, which one server has to itself: share a database, [store] url = "
        '"postgresql://…", or leave this out'
    )
    for role in ("callbacks", "probes"):
        assert problems(toml_of("server.roles", f'["{role}"]')) == [f"[server] roles: {alone}"]
        assert problems(SERVER__ROLES=role) == [f"environment NOTIFY_SERVER__SERVER__ROLES: {alone}"]
        assert load(SERVER__ROLES=role, STORE__URL="postgresql://h/d").server.roles == (role,)
    for both in ('["callbacks", "probes"]', '["probes", "callbacks"]'):
        server = load(toml_of("server.roles", both)).server
        assert server.takes_callbacks and server.probes


def test_a_store_is_a_file_of_sqlite_or_a_database_of_postgresql(load: Load, problems: Problems) -> None:
    assert load().store.path == Path("data/notify.db")
    assert load(toml_of("store.url", '"sqlite:////var/lib/n.db"')).store.path == Path("/var/lib/n.db")
    for url in ("", "notify.db", "sqlite://", "sqlite:///", "sqlite://data/n.db", "sqlite:///data/", "mysql://h/d",
                "postgresql+asyncpg://h/d"):  # fmt: skip
        assert problems(toml_of("store.url", f'"{url}"')) == [
            '[store] url: must be like "sqlite:///data/notify.db", "sqlite:////var/lib/notify.db" when absolute, '
            'or "postgresql://user:password@host/database"'
        ]
    for url in ("sqlite:///:memory:", "sqlite:///file::memory:?cache=shared", "sqlite:///n.db?mode=ro"):
        assert problems(toml_of("store.url", f'"{url}"')) == [
            "[store] url: must be a plain path of a file: nothing would be durable in memory, and there are no options"
        ]


# --- per host ---

HOSTS = """
[verify]
timeout = "30s"
per_host_interval = "1s"
[verify.hosts."example.com"]
timeout = "1s"
[verify.hosts."*.Example.com"]
timeout = "2s"
methods = ["GET"]
[verify.hosts."*.cdn.example.com"]
timeout = "3s"
accept_status = ["200-299", 304]
[verify.hosts."a.cdn.example.com"]
timeout = "4s"
"""


@pytest.mark.parametrize(
    ("hostname", "timeout"),
    [
        ("example.com", 1), ("www.example.com", 2), ("a.b.example.com", 2), ("cdn.example.com", 2),
        ("b.cdn.example.com", 3), ("x.a.cdn.example.com", 3), ("a.cdn.example.com", 4), ("notexample.com", 30),
        ("com", 30), ("", 30), ("10.0.0.1", 30), ("::1", 30),
    ],
)  # fmt: skip
def test_the_host_itself_counts_before_the_longest_wildcard(load: Load, hostname: str, timeout: float) -> None:
    assert load(HOSTS).verify.for_host(hostname).timeout == timeout


def test_an_override_changes_only_the_keys_it_names(load: Load) -> None:
    verify = load(HOSTS).verify
    www, deep = verify.for_host("www.example.com"), verify.for_host("b.cdn.example.com")
    assert (www.methods, www.per_host_interval, www.max_redirects) == (("GET",), 1, 5)
    assert deep.methods == ("HEAD", "GET")
    assert deep.accepts(304)
    assert not www.accepts(304)
    assert [status for status in (199, 200, 299, 300) if www.accepts(status)] == [200, 299]


def test_a_hosts_problems_are_named_with_the_host(problems: Problems) -> None:
    assert problems('[verify.hosts."*.example.com"]\ntimout = 1\nmethods = ["PUT"]\nretry_schedule = []') == [
        '[verify.hosts."*.example.com"] methods[0]: must be "HEAD" or "GET", not "PUT"',
        '[verify.hosts."*.example.com"] timout: unknown key, did you mean "timeout"?',
        '[verify.hosts."*.example.com"] retry_schedule: unknown key',
    ]
    assert problems('[verify.hosts]\n"*.example.com" = 5') == ['[verify.hosts."*.example.com"]: must be a table']
    assert problems('[verify.hosts."http://x"]') == [
        '[verify.hosts."http://x"]: "http://x" is not a host: '
        'write "example.com", or "*.example.com" for its subdomains'
    ]
    assert problems('[verify.hosts."a.com"]\n[verify.hosts."A.com"]') == [
        "[verify] hosts: the same host stands there twice, spelled differently"
    ]


# --- the file ---


def test_with_no_path_the_working_directory_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(None, environ={}, cwd=tmp_path) == Config()
    (tmp_path / "config.toml").write_text("[server]\nport = 1234")
    assert load_config(None, environ={}, cwd=tmp_path).server.port == 1234
    monkeypatch.chdir(tmp_path)
    assert load_config(None, environ={}).server.port == 1234


def test_a_file_that_was_named_explicitly_has_to_exist(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "gone.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load_config(path, environ={})
        assert caught.value.problems == (f"cannot read {path}: {why}",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[server]\nport = eighty\n", "line 2: Invalid value"),
        (b"[auth]\nadmin_token = 'hunter2-hunter2\n", 'line 2: Expected "\'"'),
        (b"[server]\n[log]\n[server]\n", "line 3: Cannot declare server twice"),
        (b"[verify.hosts.a]\n[verify.hosts.a]\n", "line 2: Cannot declare verify.hosts.a twice"),
        (b"[ack]\nbody = 'a\nb'\n", "line 2: Found invalid character '\\n'"),
        (b"[ack]\nbody = '''\n\n", "line 3: Expected \"'''\""),
        (b"[ack]\nbody = 1\nstatus = \xff\n", "line 3: is not UTF-8 text"),
        (b"a = " + b"[" * 5000, "is nested too deeply"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_on_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(None, environ={}, cwd=tmp_path)
    assert caught.value.problems in ((f"{path}, {problem}",), (f"{path}: {problem}",))


def test_a_byte_order_mark_is_let_pass(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbf[server]\nport = 1\n")
    assert load_config(None, environ={}, cwd=tmp_path).server.port == 1


def test_nothing_unknown_is_dropped_silently(problems: Problems) -> None:
    assert problems("[server]\nprot = 1") == ['[server] prot: unknown key, did you mean "port"?']
    assert problems("[server]\nzzz = 1") == ["[server] zzz: unknown key"]
    assert problems('[server]\n"a\\nb" = 1') == [r'[server] "a\nb": unknown key']
    assert problems("[verfy]\nprocesses = 2") == ['[verfy]: unknown section, did you mean "verify"?']
    assert problems("[_env_file]") == ["[_env_file]: unknown section"]
    assert problems("port = 1") == ["port: stands outside of any section, such as [server]"]
    assert problems("server = 5") == ["[server]: must be a table"]
    assert problems("[[server]]\nport = 1") == ["[server]: must be a table"]


def test_all_problems_are_listed_at_once(problems: Problems) -> None:
    toml = """
    [server]
    port = "eighty"
    prot = 1
    callback_path = "/api"
    [auth]
    signature = "required"
    nonce_ttl = 1
    admin_token = "short"
    [verify]
    retry_schedule = ["5s", "x", "y"]
    concurrency = 500
    [metrics]
    """
    assert problems(toml, LOG__LEVEL="loud", LOG__LEVLE="info") == [
        "[metrics]: unknown section",
        'environment NOTIFY_SERVER__LOG__LEVLE: unknown key, did you mean "level"?',
        '[server] port: must be a whole number, not "eighty"',
        '[server] callback_path: "/api" is taken: /api is the server\'s own',
        '[server] prot: unknown key, did you mean "port"?',
        '[auth] platform_keys: auth.platform_keys needs at least one key, because auth.signature is "required"',
        "[auth] nonce_ttl: must be at least timestamp_window (30s), not 1s",
        "[auth] admin_token: must be at least 8 printable ASCII characters, without spaces",
        "[verify] concurrency: 500 is more than 400 for each of verify.processes = 1: raise verify.processes, "
        "because each prober waits with select()",
        f'[verify] retry_schedule[1]: "x" {NOT_A_DURATION}',
        f'[verify] retry_schedule[2]: "y" {NOT_A_DURATION}',
        'environment NOTIFY_SERVER__LOG__LEVEL: must be "debug", "info", "warning" or "error", not "loud"',
    ]


# --- the environment ---


def test_the_environment_wins_over_the_file_key_by_key(load: Load) -> None:
    server = load('[server]\nport = 1\nhost = "::"', SERVER__PORT="2").server
    assert (server.port, server.host) == (2, "::")
    # A value that is overridden does no harm.
    assert load("[server]\nport = 'x'", SERVER__PORT="2").server.port == 2


def test_variables_are_named_in_any_case_and_others_are_none_of_ours(tmp_path: Path) -> None:
    environ = {
        "notify_server__Server__port": "2",
        "NOTIFY_SERVER__AUTH__ADMIN_TOKEN": "open-sesame",
        "NOTIFY_SERVER_CONFIG": "x",
        "PORT": "3",
        "SERVER__PORT": "4",
    }
    config = load_config(None, environ=environ, cwd=tmp_path)
    assert config.server.port == 2
    assert config.auth.admin_token is not None
    assert config.auth.admin_token.get_secret_value() == "open-sesame"


def test_every_key_can_be_set_by_the_environment(load: Load, key: str) -> None:
    config = load(
        AUTH__PLATFORM_KEYS=key,
        AUTH__SIGNATURE="required",
        ACK__BODY="[{request_id}]",
        STORE__URL="sqlite:///x,y.db",
        VERIFY__TIMEOUT="250ms",
        VERIFY__JITTER="0.5",
        VERIFY__USER_AGENT="a, b",
        VERIFY__HOSTS='{"*.example.com": {"methods": ["GET"], "timeout": "1s"}}',
    )
    assert len(config.auth.platform_keys) == 1
    assert config.ack.body == "[{request_id}]"
    assert config.store.url == "sqlite:///x,y.db"
    assert (config.verify.timeout, config.verify.jitter, config.verify.user_agent) == (0.25, 0.5, "a, b")
    assert config.verify.for_host("www.example.com").methods == ("GET",)


@pytest.mark.parametrize("value", ['["5s", "30s", 300]', "5s,30s,5m", " 5s , 30s , 300 "])
def test_a_list_in_the_environment_is_json_or_separated_by_commas(load: Load, value: str) -> None:
    assert load(VERIFY__RETRY_SCHEDULE=value).verify.retry_schedule == (5, 30, 300)
    assert load(VERIFY__ALLOWED_PORTS="443").verify.allowed_ports == (443,)
    assert load(VERIFY__ALLOWED_PORTS="[]").verify.allowed_ports == ()


@pytest.mark.parametrize("value", ["", "[443", "[" * 100_000])
def test_an_empty_or_broken_list_is_refused_because_empty_can_mean_any(problems: Problems, value: str) -> None:
    assert problems(VERIFY__ALLOWED_PORTS=value) == [
        'environment NOTIFY_SERVER__VERIFY__ALLOWED_PORTS: must be a list, like ["a", "b"]'
    ]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SERVER__PORT", "eighty", "SERVER__PORT: must be a whole number, not \"eighty\""),
        ("VERIFY__RETRY_SCHEDULE", "5s,soon", f'VERIFY__RETRY_SCHEDULE[1]: "soon" {NOT_A_DURATION}'),
        ("VERIFY__HOSTS", "x", "VERIFY__HOSTS: must be a table"),
        ("VERIFY__HOSTS", '{"a.com": {"timout": 1}}',
         'VERIFY__HOSTS "a.com" timout: unknown key, did you mean "timeout"?'),
        ("SERVER__PROT", "1", 'SERVER__PROT: unknown key, did you mean "port"?'),
        ("SERVER__PORT__X", "1", 'SERVER__PORT__X: unknown key, did you mean "port"?'),
        ("SERVER", "{}", "SERVER: unknown key"),
        ("SRVER__PORT", "1", 'SRVER__PORT: unknown section, did you mean "server"?'),
        ("", "1", ": unknown section"),
        ("ACK__BODY", "\udcff", "ACK__BODY: must be UTF-8 text"),
    ],
)  # fmt: skip
def test_a_wrong_or_unknown_variable_is_named(problems: Problems, name: str, value: str, problem: str) -> None:
    assert problems(**{name: value}) == [f"environment NOTIFY_SERVER__{problem}"]


# --- secrets, and what can be relied on ---


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://u:hunter2@db.example/notify", "postgresql://db.example/notify"),
        ("postgres://u:p%40hunter2@h:5433/d?sslmode=verify-full&connect_timeout=5", "postgresql://h:5433/d"),
        ("postgresql://u@h1:1,h2:2/d", "postgresql://h1:1,h2:2/d"),
        ("postgresql:///d?host=/run/postgresql&password=hunter2", "postgresql:///d?host=/run/postgresql"),
        ("postgresql://", "postgresql://"),
    ],
)
def test_a_database_of_postgresql_is_shown_without_its_secrets(load: Load, url: str, place: str) -> None:
    store = load(toml_of("store.url", f'"{url}"')).store
    assert (store.url, store.place, store.is_postgres) == (url, place, True)
    with pytest.raises(ConfigError, match="works on a file of SQLite only"):
        _ = store.path


def test_an_address_that_is_none_is_refused_before_anything_is_opened(problems: Problems) -> None:
    for url in ("postgresql://u:hunter2@h/d#x", "postgresql://u:hunter 2@h/d", "postgresql://[h/d"):
        (problem,) = problems(toml_of("store.url", f'"{url}"'))
        assert problem.startswith(
            '[store] url: must be like "postgresql://user:password@host/database?sslmode=require"'
        )
    assert problems(toml_of("store.url", '"postgresql://u:hunter2@h/d?sslmode=maybe"')) == [
        "[store] url: sslmode must be one of disable, allow, prefer, require, verify-ca, verify-full"
    ]


def test_a_lease_is_neither_too_short_to_be_kept_nor_too_long_to_be_waited_for(load: Load, problems: Problems) -> None:
    assert load(toml_of("store.lease", '"2m"')).store.lease == 120.0
    for lease in ("4s", "2h"):
        assert problems(toml_of("store.lease", f'"{lease}"')) == ["[store] lease: must be from 5s to 1h"]


@pytest.mark.parametrize("token", ["short-7", "with blank inside", "tab\tinside-it", "schlüssel-lang", ""])
def test_a_token_is_long_enough_and_fits_in_a_header(problems: Problems, token: str) -> None:
    for name in ("callback_token", "admin_token"):
        assert problems(toml_of(f"auth.{name}", json.dumps(token))) == [
            f"[auth] {name}: must be at least 8 printable ASCII characters, without spaces"
        ]


@pytest.mark.parametrize(
    ("key", "literal"),
    [
        ("auth.callback_token", '"hunter2 hunter2"'),
        ("auth.admin_token", '["hunter2"]'),
        ("auth.admin_token", '{hunter = "hunter2"}'),
        ("auth.platform_keys", '["hunter2"]'),
        ("auth.platform_keys", '"hunter2"'),
        ("store.url", '"mysql://user:hunter2@host/db"'),
        ("store.url", '"postgresql://user:hunter2@host/db#x"'),
        ("store.url", '["sqlite:///hunter2"]'),
    ],
)
def test_secrets_are_in_no_error(load: Load, key: str, literal: str) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError) as caught:
        load(toml_of(key, literal))
    assert "hunter2" not in str(caught.value)
    # An error's context is printed in a traceback and sent to error collectors.
    assert caught.value.__context__ is None
    with pytest.raises(ConfigError) as caught:
        load(**{f"{section}__{name}".upper(): "\udcffhunter2"})
    assert "hunter2" not in str(caught.value)


def test_secrets_are_in_no_error_of_a_config_built_in_code() -> None:
    values: Mapping[str, Any] = {"auth": {"admin_token": "hunter2"}, "store": {"url": "mysql://u:hunter2@h"}}
    with pytest.raises(ValidationError) as caught:
        Config(**values)
    assert "hunter2" not in str(caught.value)


def test_secrets_are_in_no_repr(load: Load, key: str) -> None:
    secrets = {"callback_token": "hunter2-callback", "admin_token": "hunter2-admin"}
    toml = "[auth]\n" + "".join(f'{name} = "{value}"\n' for name, value in secrets.items())
    config = load(f'{toml}platform_keys = ["{key}"]\n[store]\nurl = "sqlite:///hunter2.db"')
    for shown in (
        repr(config),
        str(config),
        repr(config.auth),
        str(config.auth),
        repr(config.store),
        str(config.store),
    ):
        assert "hunter2" not in shown
        assert key[:40] not in shown


def test_hosts_see_the_version_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    assert Config().verify.user_agent == f"notify-server/{metadata.version('notify-server')}"
    monkeypatch.setattr(metadata, "version", unknown)
    version.cache_clear()
    assert Config().verify.user_agent == "notify-server"
    version.cache_clear()


def test_nothing_can_be_changed_afterwards() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.server.port = 1
    with pytest.raises(ValidationError):
        config.server = config.server
    with pytest.raises(ValidationError):
        config.verify.for_host("example.com").timeout = 1


def test_a_config_built_in_code_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SERVER__SERVER__PORT", "1")
    assert Config().server.port == 8080
    assert load_config(None, cwd=Path("/nonexistent")).server.port == 1


def test_parsed_values_can_be_given_in_code(load: Load, key: str) -> None:
    config = load(
        f'[auth]\nplatform_keys = ["{key}"]\nadmin_token = "open-sesame"\n[verify]\nallowed_networks = ["::1"]'
    )
    parsed: Mapping[str, Any] = {name: section if name == "forward" else dict(section) for name, section in config}
    assert Config(**parsed) == config
    assert VerifyConfig(accept_status=(StatusRange(200, 204),)).for_host("x").accepts(204)
