"""The sections of the configuration, each a frozen model whose values are parsed.

A rule that depends on another key of the section is checked on the later of the two, when the earlier one is parsed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator

from notify_server.config.values import (
    DAY,
    POSTGRES_SCHEMES,
    AddressToken,
    Count,
    Duration,
    Headers,
    HeaderValue,
    HostPattern,
    MediaPattern,
    Method,
    Networks,
    Port,
    PositiveDuration,
    ReadableFile,
    Role,
    StatusRange,
    Text,
    Token,
    check_lease,
    listen_hosts,
    own_path,
    platform_key,
    proxy_url,
    share_below_one,
    site_url,
    some_and_each_once,
    status_range,
    store_url,
    whole,
    without_secrets,
)
from notify_server.contract.signature import PlatformKey
from notify_server.errors import ConfigError

# A prober waits for its connections with select(), which knows no descriptor above 1023.
_CONCURRENCY_PER_PROCESS = 400


class Section(BaseModel):
    # Inputs are hidden because pydantic's own error text would print secrets.
    model_config = ConfigDict(
        # Config builds the schemas of all sections as parts of its own: twice would take as long again at every start.
        defer_build=True,
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,
    )


class ServerConfig(Section):
    """`[server]`: where callbacks arrive. Port 0 takes any free one."""

    host: Annotated[str | tuple[str, ...], PlainValidator(listen_hosts)] = "127.0.0.1"
    port: Annotated[int, PlainValidator(whole(0, 65535))] = 8080
    callback_path: Annotated[str, PlainValidator(own_path)] = "/notify"
    body_limit_bytes: Annotated[int, PlainValidator(whole(1024, 1024**3))] = 8 * 1024**2
    shutdown_grace: PositiveDuration = 8.0
    trusted_proxies: Networks = ()
    public_url: Annotated[str, PlainValidator(site_url)] | None = None
    ssl_certificate: ReadableFile | None = None
    ssl_key: ReadableFile | None = None
    header_timeout: PositiveDuration = 10.0
    body_timeout: PositiveDuration = 30.0
    max_connections: Count = 1000
    rate_limit: Annotated[int, PlainValidator(whole(0))] = 0
    roles: Annotated[tuple[Role, ...], AfterValidator(some_and_each_once)] = ("callbacks", "probes")

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses to listen on; `::` means both families."""
        return (self.host,) if isinstance(self.host, str) else self.host

    @property
    def local_host(self) -> str:
        """The address at which a program on this machine reaches the server."""
        return "127.0.0.1" if self.hosts[0] in ("0.0.0.0", "::") else self.hosts[0]  # noqa: S104

    @property
    def local_url(self) -> str:
        """The URL at which a program on this machine reaches the server."""
        scheme = "https" if self.ssl_certificate is not None else "http"
        host = self.local_host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def takes_callbacks(self) -> bool:
        """Return whether this node takes notifications; otherwise other nodes do."""
        return "callbacks" in self.roles

    @property
    def probes(self) -> bool:
        """Return whether this node checks files; otherwise other nodes do."""
        return "probes" in self.roles

    @field_validator("ssl_key")
    @classmethod
    def _pair(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        certificate = info.data.get("ssl_certificate", key)
        if (key is None) != (certificate is None):
            raise ValueError("ssl_certificate and ssl_key go together: set both or neither")
        return key


class AuthConfig(Section):
    """`[auth]`: who may post callbacks, and who may read."""

    callback_token: AddressToken | None = None
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
        # A nonce forgotten while its timestamp is still valid could be used a second time.
        window = info.data.get("timestamp_window", 0.0)
        if ttl < window:
            raise ValueError(f"must be at least timestamp_window ({window:g}s), not {ttl:g}s")
        return ttl


class AckConfig(Section):
    """`[ack]`: the answer to an accepted callback. Only `{request_id}` in `body` is replaced, literally."""

    status: Annotated[int, PlainValidator(whole(200, 299))] = 200
    content_type: HeaderValue = "application/json"
    body: Text = '{"request_id":"{request_id}","code":"000","msg":"成功","data":null}'


class ContractConfig(Section):
    """`[contract]`: limits of a notification."""

    max_files: Count = 10_000


class StoreConfig(Section):
    """`[store]`: the location of the record. The repr leaves `url` out, because it may hold a password."""

    url: Annotated[str, PlainValidator(store_url)] = Field(default="sqlite:///data/notify.db", repr=False)
    lease: Annotated[Duration, AfterValidator(check_lease)] = 90.0

    @property
    def is_postgres(self) -> bool:
        """Return whether the record is on PostgreSQL, which several daemons may share."""
        return self.url.startswith(POSTGRES_SCHEMES)

    @property
    def place(self) -> str:
        """The location for messages and logs: a path, or an address without secrets."""
        return without_secrets(self.url)

    @property
    def path(self) -> Path:
        """The database file; a relative one is relative to the working directory. Raises ConfigError when the store is
        on PostgreSQL.
        """
        if self.is_postgres:
            raise ConfigError(["[store] url: is on PostgreSQL, this works on a file of SQLite only"])
        return Path(self.url.removeprefix("sqlite:///"))


class ProbeSettings(Section):
    """How hosts are probed."""

    per_host_concurrency: Count = 32
    per_host_interval: Duration = 0.0
    connect_timeout: PositiveDuration = 5.0
    timeout: PositiveDuration = 20.0
    methods: Annotated[tuple[Method, ...], AfterValidator(some_and_each_once)] = ("HEAD", "GET")
    accept_status: Annotated[
        tuple[Annotated[StatusRange, PlainValidator(status_range)], ...], AfterValidator(some_and_each_once)
    ] = (StatusRange(200, 299),)
    max_redirects: Annotated[int, PlainValidator(whole(0, 50))] = 5
    circuit_failures: Count = 5
    circuit_rest: PositiveDuration = 60.0

    def accepts(self, status: int) -> bool:
        """Return whether an answer with this status shows that the file is available."""
        return any(low <= status <= high for low, high in self.accept_status)


class HostSettings(ProbeSettings):
    """How one host is probed. `[verify.hosts."…"]` overrides only the keys that it sets.

    `headers` has no default for all hosts: every stranger's host would get the secrets in it.
    """

    headers: Headers = Field(default_factory=dict, repr=False)

    @functools.cached_property
    def header_lines(self) -> tuple[str, ...]:
        """Return the header lines to add to each request."""
        return tuple(f"{name}: {value.get_secret_value()}" for name, value in self.headers.items())


@functools.cache
def version() -> str:
    """Return the version of this program, empty if it runs from a source tree that is not installed."""
    try:
        return metadata.version("notify-server")
    except metadata.PackageNotFoundError:
        return ""


def _user_agent() -> str:
    return f"notify-server/{version()}".removesuffix("/")


Action = Literal["fail", "flag", "off"]


class UsableConfig(Section):
    """`[verify.usable]`: what makes a file that is there unavailable ("fail"), or is only shown ("flag")."""

    empty: Action = "fail"
    not_media: Action = "fail"
    archived: Action = "fail"
    hotlink: Action = "fail"
    expired: Action = "fail"
    sniff: Literal["off", "doubtful", "all"] = "doubtful"
    expect: tuple[MediaPattern, ...] = ()

    def action(self, reason: str) -> str:
        """Return what is done about a reason."""
        action: str = getattr(self, reason)
        return action


class VerifyConfig(ProbeSettings):
    """`[verify]`: how files are checked. `for_host` returns the settings of one host."""

    processes: Annotated[int, PlainValidator(whole(1, 64))] = 1
    concurrency: Count = 128
    retry_schedule: tuple[Duration, ...] = (5.0, 30.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0)
    jitter: Annotated[float, PlainValidator(share_below_one)] = 0.2
    backlog_limit: Count = 5_000_000
    allowed_hosts: tuple[HostPattern, ...] = ()
    allowed_networks: Networks = ()
    allowed_ports: tuple[Port, ...] = (80, 443)
    refused_networks: Networks = ()
    user_agent: HeaderValue = Field(default_factory=_user_agent)
    referer: HeaderValue | None = None
    proxy: Annotated[str, PlainValidator(proxy_url)] | None = Field(default=None, repr=False)
    ca_file: ReadableFile | None = None
    hosts: Mapping[HostPattern, HostSettings] = Field(default_factory=dict)
    usable: UsableConfig = Field(default_factory=UsableConfig)

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
        """Return the complete settings by pattern; those of all other hosts are under ""."""
        everywhere = {key: getattr(self, key) for key in ProbeSettings.model_fields}
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


class RetentionConfig(Section):
    """`[retention]`: how long settled batches and refused bodies are kept."""

    completed: PositiveDuration = 90 * DAY
    rejections: PositiveDuration = 30 * DAY


class LogConfig(Section):
    """`[log]`: the log on standard error."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"
