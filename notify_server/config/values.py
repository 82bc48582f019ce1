"""The parsers of single values: durations, hosts, networks, addresses. Each takes text or a TOML value.

A parser raises ValueError with one line: the error and the correct form; its caller adds the key.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, PlainValidator, SecretStr

from notify_server.contract.host import canonical_pattern
from notify_server.contract.signature import PlatformKey, load_platform_key

DAY = 86_400.0
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY, "": 1.0}
POSTGRES_SCHEMES = ("postgresql://", "postgres://")
_SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_OWN_PATHS = ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/api", "/ui")


def show(value: object) -> str:
    """A value as an error may show it: one line, short, nothing that a terminal would obey."""
    if isinstance(value, (dict, list)):
        return "a table" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=not (isinstance(value, str) and value.isprintable()), default=str)
    return text if len(text) <= 80 else f"{text[:76]}..."


def duration(value: object) -> float:
    """Seconds, from a number of them or from text such as "250ms", "30s", "5m", "2h", "10d"; at most 100 years."""
    seconds = -1.0
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(min(value, 1e30))
    elif isinstance(value, str) and (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhd]?)", value.strip())):
        seconds = float(match[1]) * _UNITS[match[2]]
    if not seconds >= 0:
        raise ValueError(f'{show(value)} is not a duration: write a number of seconds, or "30s", "5m", "2h"')
    if seconds > 36_500 * DAY:
        raise ValueError(f"{show(value)} is too long")
    return seconds


def whole(low: int, high: int | None = None) -> Callable[[object], int]:
    """A parser of whole numbers from `low` to `high`, both included; text is for the environment."""
    wanted = f"at least {low}" if high is None else f"from {low} to {high}"

    def parse(value: object) -> int:
        numeral = str(value).strip() if isinstance(value, (int, str)) else ""
        if not re.fullmatch(r"-?[0-9]{1,18}", numeral):
            raise ValueError(f"must be a whole number, not {show(value)}")
        number = int(numeral)
        if number < low or (high is not None and number > high):
            raise ValueError(f"must be {wanted}, not {number}")
        return number

    return parse


def share_below_one(value: object) -> float:
    """A share of the wait, from 0 to below 1: at 1 a retry could come at once."""
    try:
        share = -1.0 if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"must be a number from 0 to below 1, not {show(value)}")
    return share


def text(value: object) -> str:
    """Text that can be encoded: a variable may hold bytes that are not UTF-8. Not shown, because it may be secret."""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise ValueError("must be UTF-8 text")
    return value


def matching(pattern: str, wanted: str) -> Callable[[object], str]:
    """A parser of text that matches `pattern` from end to end."""

    def parse(value: object) -> str:
        plain = text(value)
        if not re.fullmatch(pattern, plain):
            raise ValueError(f"must be {wanted}, not {show(plain)}")
        return plain

    return parse


site_url = matching(
    r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]*)?",
    'an http or https URL without a query, like "https://notify.example.com/notify"',
)


def token(value: object) -> SecretStr:
    """A secret that fits in a header and in an address; the error never shows it."""
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(plain, str) or not re.fullmatch(r"[!-~]{8,}", plain):
        raise ValueError("must be at least 8 printable ASCII characters, without spaces")
    return SecretStr(plain)


def address_token(value: object) -> SecretStr:
    """A secret that fits in the address that is registered with the platform, as it is."""
    secret = token(value)
    if set("&#") & set(secret.get_secret_value()):
        raise ValueError("must not contain & or #, which end it in the registered address: `openssl rand -hex 24`")
    return secret


def listen_hosts(value: object) -> str | tuple[str, ...]:
    """An address or a name to listen on, or a list of them; in the environment also as JSON or between commas."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            decoded = json.loads(value)
            value = decoded if isinstance(decoded, list) else value
    elif isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, (list, tuple)):
        if not value or len(set(map(str, value))) < len(value):
            raise ValueError("must have at least one entry, and none twice")
        return tuple(map(_listen_host, value))
    return _listen_host(value)


_listen_host = matching(r"[!-+\--Z^-~]+", 'an address or a name, like "127.0.0.1"')


def own_path(value: object) -> str:
    """A path that a route can have literally: no escapes, no dot segments that clients rewrite, none of ours."""
    path = text(value)
    shape = re.fullmatch(r"/[A-Za-z0-9._~!$&'()*+,;=:@/-]+", path)
    if not shape or "//" in path or {".", ".."} & set(path.split("/")):
        raise ValueError(f'must be a plain path like "/notify", without query, fragment or blanks, not {show(path)}')
    if own := next((own for own in _OWN_PATHS if f"{path}/".startswith(f"{own}/")), None):
        raise ValueError(f"{show(path)} is taken: {own} is the server's own")
    return path


def network(value: object) -> IPNetwork:
    """A network in CIDR form, or one address. Bits beyond the prefix are refused, as they hide a slip."""
    if isinstance(value, IPNetwork):
        return value
    given, meant = text(value).strip(), '"10.0.0.0/8", "192.0.2.7" or "fd00::/8"'
    try:
        meant = f'"{ipaddress.ip_network(given, strict=False)}"'
        return ipaddress.ip_network(given)
    except ValueError:
        raise ValueError(f"{show(given)} is not a network: write {meant}") from None


def host_pattern(value: object) -> str:
    """A host, or `*.` and a name for all of its subdomains, in the spelling that the guard compares by."""
    given = text(value)
    try:
        return canonical_pattern(given)
    except ValueError as error:
        raise ValueError(f"{show(given)} {error}") from None


class StatusRange(NamedTuple):
    """HTTP statuses from `low` to `high`, both included."""

    low: int
    high: int


def status_range(value: object) -> StatusRange:
    if isinstance(value, StatusRange):
        return value
    match = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", "" if isinstance(value, bool) else str(value).strip())
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f'{show(value)} is not a status: write "204", or "200-299"')
    return StatusRange(int(match[1]), int(match[2] or match[1]))


def readable_file(value: object) -> Path:
    path = value if isinstance(value, Path) else Path(text(value))
    try:
        path.open("rb").close()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read {show(str(path))}: {why}") from None
    return path


def store_url(value: object) -> str:
    """`sqlite:///relative` or `sqlite:////absolute`, the path as it is; or `postgresql://user:password@host/database`,
    as libpq has it. No error shows it: it may hold a password.
    """
    url = text(value)
    if url.startswith(POSTGRES_SCHEMES):
        return _postgres_url(url)
    if not url.startswith("sqlite:///") or url.endswith("/") or not url.isprintable():
        raise ValueError(
            'must be like "sqlite:///data/notify.db", "sqlite:////var/lib/notify.db" when absolute, '
            'or "postgresql://user:password@host/database"'
        )
    if ":memory:" in url or re.search(r"[?#]", url):
        raise ValueError("must be a plain path of a file: nothing would be durable in memory, and there are no options")
    return url


_HOST_AND_PORT = re.compile(r"(?:\[[^\]]*\]|[^\[\]:]*)(?::[0-9]*)?").fullmatch


def _postgres_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        # A slash or a colon in a password ends the host too early.
        hosts = parts.netloc.rpartition("@")[2].split(",")
        readable = "@" not in parts.path and not parts.fragment and all(map(_HOST_AND_PORT, hosts))
    except ValueError:
        readable, options = False, {}
    if not readable or not url.isprintable() or re.search(r"\s", url):
        raise ValueError(
            'must be like "postgresql://user:password@host/database?sslmode=require", with special characters in '
            "names and passwords as %XX"
        )
    if options.get("sslmode", ["prefer"])[-1] not in _SSLMODES:
        raise ValueError(f"sslmode must be one of {', '.join(_SSLMODES)}")
    return url


def without_secrets(url: str) -> str:
    """The address of a store as it may be shown and logged: without user, password and options."""
    if not url.startswith(POSTGRES_SCHEMES):
        return url.removeprefix("sqlite:///")
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    sockets = parse_qs(parts.query).get("host", [])
    return f"postgresql://{host}{parts.path}" + (f"?host={sockets[-1]}" if sockets and not host else "")


# Options of libpq whose values may be shown; any other may be a password, or hold one.
_SHOWN_OPTIONS = frozenset(
    {"application_name", "connect_timeout", "dbname", "host", "port", "sslcert", "sslkey", "sslmode", "sslrootcert"}
    | {"target_session_attrs"}
)


def with_secrets_hidden(url: str) -> str:
    """Return the address of a store or a proxy with user, password and the values of doubtful options as `…`."""
    if not url.startswith((*POSTGRES_SCHEMES, *_PROXY_SCHEMES)):
        return url
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    options = [
        option if option.partition("=")[0] in _SHOWN_OPTIONS else f"{option.partition('=')[0]}=…"
        for option in parts.query.split("&")
    ]
    query = f"?{'&'.join(options)}" if parts.query else ""
    return f"{parts.scheme}://{'…@' if at else ''}{host}{parts.path}{query}"


_PROXY_SCHEMES = ("http://", "https://")


def proxy_url(value: object) -> str:
    """`http://host:port`, with `user:password@` if the proxy wants it. No error shows it: it may hold a password."""
    url = text(value)
    try:
        parts = urlsplit(url)
        ends = (parts.path or "/", parts.query, parts.fragment)
        is_plain = bool(parts.hostname and parts.port) and ends == ("/", "", "")
    except ValueError:
        is_plain = False
    if not url.startswith(_PROXY_SCHEMES) or not is_plain or not re.fullmatch("[!-~]+", url):
        raise ValueError(
            'must be like "http://proxy.example.com:3128" or "http://user:password@proxy.example.com:3128", with '
            "special characters in names and passwords as %XX"
        )
    return url


# Fields that the prober sets itself, or that would change where a request ends.
_OWN_HEADERS = frozenset(
    {"connection", "content-length", "expect", "host", "range", "te", "transfer-encoding", "upgrade"}
)


def header_name(value: object) -> str:
    name = text(value)
    # RFC 9110, section 5.6.2.
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError(f'{show(name)} is not the name of a header: write it like "Authorization"')
    if name.lower() in _OWN_HEADERS:
        raise ValueError(f"{show(name)} is set by the prober itself: leave it out")
    return name


def header_secret(value: object) -> SecretStr:
    """A header's value. No error shows it: it may be a password."""
    given = value.get_secret_value() if isinstance(value, SecretStr) else text(value)
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", given):
        raise ValueError("must be printable ASCII, not blank at its ends")
    return SecretStr(given)


def platform_key(value: object) -> PlatformKey:
    return value if isinstance(value, PlatformKey) else load_platform_key(text(value))


def positive(seconds: float) -> float:
    if seconds <= 0:
        raise ValueError("must be more than 0")
    return seconds


def some_and_each_once(values: tuple[object, ...]) -> tuple[object, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must have at least one entry, and none twice")
    return values


def check_lease(seconds: float) -> float:
    if not 5 <= seconds <= 3600:
        raise ValueError("must be from 5s to 1h")
    return seconds


Duration = Annotated[float, PlainValidator(duration)]
PositiveDuration = Annotated[Duration, AfterValidator(positive)]
Count = Annotated[int, PlainValidator(whole(1))]
Port = Annotated[int, PlainValidator(whole(1, 65535))]
Text = Annotated[str, PlainValidator(text)]
# RFC 9110, section 5.5, without the obsolete forms.
HeaderValue = Annotated[str, PlainValidator(matching(r"[!-~]([ -~]*[!-~])?", "printable ASCII, not blank at its ends"))]
Headers = Mapping[Annotated[str, PlainValidator(header_name)], Annotated[SecretStr, PlainValidator(header_secret)]]
Token = Annotated[SecretStr, PlainValidator(token)]
AddressToken = Annotated[SecretStr, PlainValidator(address_token)]
Networks = tuple[Annotated[IPNetwork, PlainValidator(network)], ...]
MediaPattern = Annotated[
    str, PlainValidator(matching(r"[a-z]+/(?:\*|[a-z0-9][a-z0-9.+-]*)", 'a media type, like "image/*" or "video/mp4"'))
]
HostPattern = Annotated[str, PlainValidator(host_pattern)]
ReadableFile = Annotated[Path, PlainValidator(readable_file)]
Method = Literal["HEAD", "GET"]
Role = Literal["callbacks", "probes"]
