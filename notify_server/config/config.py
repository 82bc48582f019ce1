"""The configuration: `config.toml` and `NOTIFY_SERVER__SECTION__KEY`, read and checked whole before anything is opened.

Every value is frozen and parsed: durations are seconds, networks are `ipaddress` networks, platform keys are loaded.
Only `load_config` reads the environment or the file; a `Config(...)` built in code is what it is given, and defaults.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, cast
from urllib.parse import parse_qs, urlsplit

import yarl
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from notify_server.contract.signature import PlatformKey, load_platform_key
from notify_server.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ENV_PREFIX = "NOTIFY_SERVER__"
DAY = 86_400.0
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY, "": 1.0}
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_POSTGRES = ("postgresql://", "postgres://")
_SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_ROLES = ("server", "roles")
FORWARD = "forward"
_OWN_PATHS = ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/api", "/ui")
# A prober waits for its connections with select(), which knows no descriptor above 1023.
_CONCURRENCY_PER_PROCESS = 400


# --- Values, from text or TOML. Each raises ValueError with one line that names neither key nor place. ---


def _show(value: object) -> str:
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
        raise ValueError(f'{_show(value)} is not a duration: write a number of seconds, or "30s", "5m", "2h"')
    if seconds > 36_500 * DAY:
        raise ValueError(f"{_show(value)} is too long")
    return seconds


def whole(low: int, high: int | None = None) -> Callable[[object], int]:
    """A parser of whole numbers from `low` to `high`, both included; text is for the environment."""
    wanted = f"at least {low}" if high is None else f"from {low} to {high}"

    def parse(value: object) -> int:
        numeral = str(value).strip() if isinstance(value, (int, str)) else ""
        if not re.fullmatch(r"-?[0-9]{1,18}", numeral):
            raise ValueError(f"must be a whole number, not {_show(value)}")
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
        raise ValueError(f"must be a number from 0 to below 1, not {_show(value)}")
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
            raise ValueError(f"must be {wanted}, not {_show(plain)}")
        return plain

    return parse


def token(value: object) -> SecretStr:
    """A secret that fits in a header and in an address; the error never shows it."""
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(plain, str) or not re.fullmatch(r"[!-~]{8,}", plain):
        raise ValueError("must be at least 8 printable ASCII characters, without spaces")
    return SecretStr(plain)


def own_path(value: object) -> str:
    """A path that a route can have literally: no escapes, no dot segments that clients rewrite, none of ours."""
    path = text(value)
    shape = re.fullmatch(r"/[A-Za-z0-9._~!$&'()*+,;=:@/-]+", path)
    if not shape or "//" in path or {".", ".."} & set(path.split("/")):
        raise ValueError(f'must be a plain path like "/notify", without query, fragment or blanks, not {_show(path)}')
    if own := next((own for own in _OWN_PATHS if f"{path}/".startswith(f"{own}/")), None):
        raise ValueError(f"{_show(path)} is taken: {own} is the server's own")
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
        raise ValueError(f"{_show(given)} is not a network: write {meant}") from None


def host_pattern(value: object) -> str:
    """A host, or `*.` and a host for every depth of its subdomains but not itself; lower case, IDNs as punycode."""
    bare = text(value).strip().removesuffix(".").lower()
    wildcard, name = ("*.", bare[2:]) if bare.startswith("*.") else ("", bare)
    try:
        return str(ipaddress.ip_address(bare.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    try:
        ascii_name = name if name.isascii() else yarl.URL.build(scheme="http", host=name).raw_host or ""
    except ValueError:
        ascii_name = ""
    labels = ascii_name.split(".")
    if len(ascii_name) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ValueError(f'{_show(value)} is not a host: write "example.com", or "*.example.com" for its subdomains')
    return wildcard + ascii_name


class StatusRange(NamedTuple):
    """HTTP statuses from `low` to `high`, both included."""

    low: int
    high: int


def status_range(value: object) -> StatusRange:
    if isinstance(value, StatusRange):
        return value
    match = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", "" if isinstance(value, bool) else str(value).strip())
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f'{_show(value)} is not a status: write "204", or "200-299"')
    return StatusRange(int(match[1]), int(match[2] or match[1]))


def readable_file(value: object) -> Path:
    path = value if isinstance(value, Path) else Path(text(value))
    try:
        path.open("rb").close()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read {_show(str(path))}: {why}") from None
    return path


def store_url(value: object) -> str:
    """`sqlite:///relative` or `sqlite:////absolute`, the path as it is; or `postgresql://user:password@host/database`,
    as libpq has it. No error shows it: it may hold a password.
    """
    url = text(value)
    if url.startswith(_POSTGRES):
        return _postgres_url(url)
    if not url.startswith("sqlite:///") or url.endswith("/") or not url.isprintable():
        raise ValueError(
            'must be like "sqlite:///data/notify.db", "sqlite:////var/lib/notify.db" when absolute, '
            'or "postgresql://user:password@host/database"'
        )
    if ":memory:" in url or re.search(r"[?#]", url):
        raise ValueError("must be a plain path of a file: nothing would be durable in memory, and there are no options")
    return url


def _postgres_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        parts, options = None, {}
    if parts is None or parts.fragment or not url.isprintable() or re.search(r"\s", url):
        raise ValueError(
            'must be like "postgresql://user:password@host/database?sslmode=require", with what is special in a name '
            "or a password as %XX"
        )
    if options.get("sslmode", ["prefer"])[-1] not in _SSLMODES:
        raise ValueError(f"sslmode must be one of {', '.join(_SSLMODES)}")
    return url


def without_secrets(url: str) -> str:
    """The address of a store as it may be shown and logged: without user, password and options."""
    if not url.startswith(_POSTGRES):
        return url.removeprefix("sqlite:///")
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    sockets = parse_qs(parts.query).get("host", [])
    return f"postgresql://{host}{parts.path}" + (f"?host={sockets[-1]}" if sockets and not host else "")


def platform_key(value: object) -> PlatformKey:
    return value if isinstance(value, PlatformKey) else load_platform_key(text(value))


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise ValueError("must be more than 0")
    return seconds


def _some_and_each_once(values: tuple[object, ...]) -> tuple[object, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must have at least one entry, and none twice")
    return values


def _lease(seconds: float) -> float:
    if not 5 <= seconds <= 3600:
        raise ValueError("must be from 5s to 1h")
    return seconds


Duration = Annotated[float, PlainValidator(duration)]
PositiveDuration = Annotated[Duration, AfterValidator(_positive)]
Count = Annotated[int, PlainValidator(whole(1))]
Port = Annotated[int, PlainValidator(whole(1, 65535))]
Text = Annotated[str, PlainValidator(text)]
# RFC 9110, section 5.5, without what is obsolete there.
HeaderValue = Annotated[str, PlainValidator(matching(r"[!-~]([ -~]*[!-~])?", "printable ASCII, not blank at its ends"))]
Token = Annotated[SecretStr, PlainValidator(token)]
Networks = tuple[Annotated[IPNetwork, PlainValidator(network)], ...]
HostPattern = Annotated[str, PlainValidator(host_pattern)]
ReadableFile = Annotated[Path, PlainValidator(readable_file)]
Method = Literal["HEAD", "GET"]
Role = Literal["callbacks", "probes"]


# --- The sections. What depends on another key is checked on the later one, with what the earlier ones came to. ---


class _Section(BaseModel):
    # Inputs are hidden because pydantic's own error text would print secrets.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)


class ServerConfig(_Section):
    """`[server]`: where callbacks arrive. Port 0 takes any free one."""

    host: Annotated[str, PlainValidator(matching(r"[!-~]+", 'an address or a name, like "127.0.0.1"'))] = "127.0.0.1"
    port: Annotated[int, PlainValidator(whole(0, 65535))] = 8080
    callback_path: Annotated[str, PlainValidator(own_path)] = "/notify"
    body_limit_bytes: Annotated[int, PlainValidator(whole(1024, 1024**3))] = 8 * 1024**2
    shutdown_grace: PositiveDuration = 20.0
    trusted_proxies: Networks = ()
    ssl_certificate: ReadableFile | None = None
    ssl_key: ReadableFile | None = None
    header_timeout: PositiveDuration = 10.0
    body_timeout: PositiveDuration = 30.0
    max_connections: Count = 1000
    rate_limit: Annotated[int, PlainValidator(whole(0))] = 0
    roles: Annotated[tuple[Role, ...], AfterValidator(_some_and_each_once)] = ("callbacks", "probes")

    @property
    def takes_callbacks(self) -> bool:
        """Whether notifications are taken here; other nodes take them otherwise."""
        return "callbacks" in self.roles

    @property
    def probes(self) -> bool:
        """Whether files are asked for here; other nodes ask for them otherwise."""
        return "probes" in self.roles

    @field_validator("ssl_key")
    @classmethod
    def _pair(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        certificate = info.data.get("ssl_certificate", key)
        if (key is None) != (certificate is None):
            raise ValueError("ssl_certificate and ssl_key go together: set both or neither")
        return key


class AuthConfig(_Section):
    """`[auth]`: who may call back, and who may look."""

    callback_token: Token | None = None
    callback_networks: Networks = ()
    signature: Literal["off", "optional", "required"] = "off"
    platform_keys: tuple[Annotated[PlatformKey, PlainValidator(platform_key)], ...] = Field(default=(), repr=False)
    timestamp_window: PositiveDuration = 30.0
    nonce_ttl: PositiveDuration = 60.0
    admin_token: Token | None = None

    @field_validator("platform_keys")
    @classmethod
    def _keys_to_verify_with(cls, keys: tuple[PlatformKey, ...], info: ValidationInfo) -> tuple[PlatformKey, ...]:
        signature = info.data.get("signature", "off")
        if signature != "off" and not keys:
            raise ValueError(f'auth.platform_keys needs at least one key, because auth.signature is "{signature}"')
        return keys

    @field_validator("nonce_ttl")
    @classmethod
    def _outlives_the_window(cls, ttl: float, info: ValidationInfo) -> float:
        # A nonce forgotten while its timestamp is still good could be used a second time.
        window = info.data.get("timestamp_window", 0.0)
        if ttl < window:
            raise ValueError(f"must be at least timestamp_window ({window:g}s), not {ttl:g}s")
        return ttl


class AckConfig(_Section):
    """`[ack]`: the answer to an accepted callback. Only `{request_id}` in `body` is replaced, literally."""

    status: Annotated[int, PlainValidator(whole(200, 299))] = 200
    content_type: HeaderValue = "application/json"
    body: Text = '{"request_id":"{request_id}","code":"000","msg":"成功","data":null}'


class ContractConfig(_Section):
    """`[contract]`: what a notification may hold."""

    max_files: Count = 10_000


class StoreConfig(_Section):
    """`[store]`: where it is kept. `url` is left out of the repr, because an address may hold a password."""

    url: Annotated[str, PlainValidator(store_url)] = Field(default="sqlite:///data/notify.db", repr=False)
    lease: Annotated[Duration, AfterValidator(_lease)] = 90.0

    @property
    def is_postgres(self) -> bool:
        """Whether it is a database on a server, which several daemons may share."""
        return self.url.startswith(_POSTGRES)

    @property
    def place(self) -> str:
        """Where it is, to be shown and logged: a path, or an address without secrets."""
        return without_secrets(self.url)

    @property
    def path(self) -> Path:
        """The database file; a relative one is relative to the working directory. Raises ConfigError when the store is
        on PostgreSQL.
        """
        if self.is_postgres:
            raise ConfigError(["[store] url: is on PostgreSQL, this works on a file of SQLite only"])
        return Path(self.url.removeprefix("sqlite:///"))


class HostSettings(_Section):
    """How one host is probed. In `[verify.hosts."…"]` only what is set there counts."""

    per_host_concurrency: Count = 32
    per_host_interval: Duration = 0.0
    connect_timeout: PositiveDuration = 5.0
    timeout: PositiveDuration = 20.0
    methods: Annotated[tuple[Method, ...], AfterValidator(_some_and_each_once)] = ("HEAD", "GET")
    accept_status: Annotated[
        tuple[Annotated[StatusRange, PlainValidator(status_range)], ...], AfterValidator(_some_and_each_once)
    ] = (StatusRange(200, 299),)
    max_redirects: Annotated[int, PlainValidator(whole(0, 50))] = 5
    circuit_failures: Count = 5
    circuit_rest: PositiveDuration = 60.0

    def accepts(self, status: int) -> bool:
        """Whether an answer with this status shows that the file is there."""
        return any(low <= status <= high for low, high in self.accept_status)


@functools.cache
def version() -> str:
    """The version of this program, empty when it runs from a source tree that has not been installed."""
    try:
        return metadata.version("notify-server")
    except metadata.PackageNotFoundError:
        return ""


def _user_agent() -> str:
    return f"notify-server/{version()}".removesuffix("/")


class VerifyConfig(HostSettings):
    """`[verify]`: how files are asked for. Ask `for_host` for what holds for one host."""

    processes: Annotated[int, PlainValidator(whole(1, 64))] = 1
    concurrency: Count = 128
    retry_schedule: tuple[Duration, ...] = (5.0, 30.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0)
    jitter: Annotated[float, PlainValidator(share_below_one)] = 0.2
    backlog_limit: Count = 5_000_000
    allowed_hosts: tuple[HostPattern, ...] = ()
    allowed_networks: Networks = ()
    allowed_ports: tuple[Port, ...] = (80, 443)
    user_agent: HeaderValue = Field(default_factory=_user_agent)
    ca_file: ReadableFile | None = None
    hosts: Mapping[HostPattern, HostSettings] = Field(default_factory=dict)

    @field_validator("concurrency")
    @classmethod
    def _within_select(cls, concurrency: int, info: ValidationInfo) -> int:
        processes = info.data.get("processes", concurrency)
        if concurrency > _CONCURRENCY_PER_PROCESS * processes:
            raise ValueError(
                f"{concurrency} is more than {_CONCURRENCY_PER_PROCESS} for each of verify.processes = {processes}: "
                "raise verify.processes, because each prober waits with select()"
            )
        return concurrency

    @field_validator("retry_schedule")
    @classmethod
    def _schedule_length(cls, schedule: tuple[float, ...]) -> tuple[float, ...]:
        if len(schedule) > 50:
            raise ValueError(f"must have at most 50 entries, not {len(schedule)}")
        return schedule

    @field_validator("hosts", mode="wrap")
    @classmethod
    def _each_host_once(cls, value: Any, parse: Callable[[Any], Any]) -> Any:
        hosts = parse(value)
        if len(hosts) < len(value):
            raise ValueError("the same host stands there twice, spelled differently")
        return hosts

    @functools.cached_property
    def effective(self) -> dict[str, HostSettings]:
        """The settings by pattern, with what they leave out filled in; under "" those of any other host."""
        everywhere = {key: getattr(self, key) for key in HostSettings.model_fields}
        own = {host: {key: getattr(some, key) for key in some.model_fields_set} for host, some in self.hosts.items()}
        return {host: HostSettings.model_construct(**everywhere | keys) for host, keys in {"": {}, **own}.items()}

    def for_host(self, hostname: str) -> HostSettings:
        """The settings of a canonical host name (lower case, punycode, no port).

        The most specific pattern alone applies over the section's own keys: the host itself, else the longest wildcard.
        """
        effective = self.effective
        if hostname in effective:
            return effective[hostname]
        parent = hostname
        while len(effective) > 1 and parent:
            parent = parent.partition(".")[2]
            if f"*.{parent}" in effective:
                return effective[f"*.{parent}"]
        return effective[""]


class RetentionConfig(_Section):
    """`[retention]`: how long settled batches and refused bodies are kept."""

    completed: PositiveDuration = 90 * DAY
    rejections: PositiveDuration = 30 * DAY


class LogConfig(_Section):
    """`[log]`: what is written to standard error."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"


# Both are made of the parts above.
from notify_server.config.forward import KINDS, AlertConfig, Forward  # noqa: E402


class Config(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    server: ServerConfig = Field(default_factory=ServerConfig)
    auth: AuthConfig = Field(default_factory=AuthConfig)
    ack: AckConfig = Field(default_factory=AckConfig)
    contract: ContractConfig = Field(default_factory=ContractConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    retention: RetentionConfig = Field(default_factory=RetentionConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    forward: Forward = ()
    alert: AlertConfig = Field(default_factory=AlertConfig)

    @model_validator(mode="after")
    def _one_server_does_both(self) -> Self:
        server = self.server
        if not (self.store.is_postgres or (server.takes_callbacks and server.probes)):
            raise ValueError(
                "must be both with a file of SQLite, which one server has to itself: share a database, [store] url = "
                '"postgresql://…", or leave this out'
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *args: Any, **others: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # A Config built in code must not depend on the machine's environment.
        return (init_settings,)


# --- Reading, and saying what is wrong. ---


class _Variables(EnvSettingsSource):
    """pydantic-settings' nesting of variables, from a given mapping and with lists that need not be JSON."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        super().__init__(Config, env_prefix=ENV_PREFIX, env_nested_delimiter="__", case_sensitive=False)
        self.env_vars = {name.lower(): value for name, value in variables.items()}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: str) -> Any:
        """JSON when it looks like it, else text between commas; what is neither is left for the section to refuse."""
        if not value.lstrip().startswith(("[", "{")):
            return [part.strip() for part in value.split(",")]
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value


def load_config(path: Path | None, *, environ: Mapping[str, str] = os.environ, cwd: Path | None = None) -> Config:
    """The configuration from a TOML file and the environment.

    With no `path`, `config.toml` in `cwd` (the working directory) when it is there. Paths inside the file are relative
    to the working directory of the process. Raises ConfigError: everything that is wrong, one line each.
    """
    tables = _read(path or (cwd or Path()) / "config.toml", optional=path is None)
    problems = [_misplaced(name, value) for name, value in tables.items() if name not in Config.model_fields]
    known, unknown = _sort_variables(environ)
    problems += unknown
    variables = _Variables(known)()
    values = {}
    for section in Config.model_fields:
        if section == FORWARD:
            # A list: the variable takes the place of the whole.
            values[section] = variables.get(section, tables.get(section, []))
            continue
        table = tables.get(section, {})
        values[section] = table | variables.get(section, {}) if isinstance(table, dict) else table
    config = None
    try:
        config = Config(**values)
    except ValidationError as error:
        problems += [_problem(each, variables) for each in error.errors(include_url=False)]
    # Raised out here because an error's context is printed with it, and pydantic's holds the values.
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _read(path: Path, *, optional: bool) -> dict[str, Any]:
    """The file's tables; a byte order mark is let pass, because some editors write one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        if optional and isinstance(error, FileNotFoundError):
            return {}
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}, line {content.count(10, 0, error.start) + 1}: is not UTF-8 text"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: is nested too deeply"]) from None
    except ValueError as error:
        # tomllib's texts quote keys, never values, so they can be shown.
        what, _, place = re.sub(r"\('(.+?)',?\)", r"\1", str(error)).replace("', '", ".").partition(" (at ")
        line = re.match(r"line ([0-9]+)", place)
        number = line[1] if line else len(content.splitlines())
        raise ConfigError([f"{path}, line {number}: {what}"]) from None


def _sort_variables(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Our variables: those that name a key, and a line for each that does not."""
    known, problems = {}, []
    for name, value in environ.items():
        if not name.upper().startswith(ENV_PREFIX):
            continue
        section, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
        if section == FORWARD and not key:
            known[name] = value
        elif section not in Config.model_fields:
            problems.append(f"environment {name}: {_unknown('section', section, Config.model_fields)}")
        elif key not in _keys(section):
            problems.append(f"environment {name}: {_unknown('key', key, _keys(section))}")
        else:
            known[name] = value
    return known, problems


def _keys(section: str) -> Iterable[str]:
    if section == FORWARD:
        return ()
    return cast("type[_Section]", Config.model_fields[section].annotation).model_fields


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"unknown {what}" + (f', did you mean "{near[0]}"?' if near else "")


def _name(key: str) -> str:
    """A key as TOML would write it."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _show(key)


def _misplaced(name: str, value: object) -> str:
    if isinstance(value, dict):
        return f"[{_name(name)}]: {_unknown('section', name, Config.model_fields)}"
    return f"{_name(name)}: stands outside of any section, such as [server]"


def _forward_problem(error: ErrorDetails) -> str:
    """One line that names the entry and key, such as `forward[1].secret: …`. Values are not shown: they are secrets."""
    place, kind = FORWARD, ""
    for part in error["loc"][1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not kind and part in KINDS:
            kind = part
        else:
            place += f".{_name(part)}"
    match error["type"]:
        case "value_error":
            what = str(error["ctx"]["error"])
        case "missing":
            what = "is needed"
        case "extra_forbidden":
            what = _unknown("key", str(error["loc"][-1]), KINDS[kind].model_fields)
        case "literal_error":
            what = "must be " + error["ctx"]["expected"].replace("'", '"')
        case "tuple_type" if place == FORWARD:
            what = "must be a list of tables: write [[forward]]"
        case "tuple_type":
            what = 'must be a list, like ["a", "b"]'
        case _:
            what = "must be a table"
    return f"{place}: {what}"


def _problem(error: ErrorDetails, variables: Mapping[str, Mapping[str, object]]) -> str:
    """One line: the section and key, or the variable, that the value came from, and what is wrong with it."""
    if error["loc"][:1] == (FORWARD,):
        return _forward_problem(error)
    # What is wrong with the whole is what its one rule is about.
    section, *rest = error["loc"] or _ROLES
    inside_hosts = (section, *rest[:1]) == ("verify", "hosts") and len(rest) > 1
    if rest and rest[0] in variables.get(str(section), {}):
        place = "environment " + f"{ENV_PREFIX}{section}__{rest.pop(0)}".upper()
    elif inside_hosts:
        place, rest = f"[verify.hosts.{_show(rest[1])}]", rest[2:]
    else:
        place = f"[{section}]"
    for part in rest:
        place += f"[{part}]" if isinstance(part, int) else f" {_name(part)}" if part != "[key]" else ""
    match error["type"]:
        case "value_error":
            what = str(error["ctx"]["error"])
        case "extra_forbidden":
            known = HostSettings.model_fields if inside_hosts else _keys(str(section))
            what = _unknown("key", str(error["loc"][-1]), known)
        case "literal_error":
            wanted = error["ctx"]["expected"].replace("'", '"')
            what = f"must be {wanted}, not {_show(error['input'])}"
        case "tuple_type":
            what = 'must be a list, like ["a", "b"]'
        case _:
            what = "must be a table"
    return f"{place}: {what}"
