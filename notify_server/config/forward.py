"""`[[forward]]`, where events go, and `[alert]`, when people are warned early."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    SecretStr,
    Tag,
    ValidationInfo,
    field_validator,
)
from yarl import URL

from notify_server.config.accept import Accept, parse_accept
from notify_server.config.sections import Section
from notify_server.config.values import Duration, Networks, PositiveDuration, ReadableFile, Text, matching, show, text
from notify_server.events.payload import PROBLEMS, EventType, matching_types
from notify_server.expect.quiet import QuietLimit

MAX_ENDPOINTS = 100
# Patterns of [alert] quiet.
MAX_QUIET = 100
# Standard Webhooks 1.0.0 requires 24 to 64 random bytes.
WEBHOOK_PREFIX = "whsec_"
MIN_SECRET_BYTES = 24
MAX_SECRET_BYTES = 64
BOTS = ("dingtalk", "wecom", "feishu")
# Robots that refuse a message without one of their own safeguards.
_BOT_SECRETS = ("dingtalk", "feishu")
# The vendors' hosts: whose robots they are, and the parameter that has the robot's token.
_ROBOT_HOSTS = {
    "oapi.dingtalk.com": ("dingtalk", "access_token"),
    "qyapi.weixin.qq.com": ("wecom", "key"),
    "open.feishu.cn": ("feishu", None),
    "open.larksuite.com": ("feishu", None),
}


def webhook_secret(value: object) -> SecretStr:
    """Validate a secret of Standard Webhooks. No error shows it."""
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    wanted = f"must be {WEBHOOK_PREFIX} and the base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} random bytes"
    if not isinstance(plain, str) or not plain.startswith(WEBHOOK_PREFIX):
        raise ValueError(wanted)
    try:
        key = base64.b64decode(plain.removeprefix(WEBHOOK_PREFIX), validate=True)
    except ValueError:
        raise ValueError(wanted) from None
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ValueError(wanted)
    return SecretStr(plain)


def _bot_secret(value: object) -> SecretStr:
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(plain, str) or not re.fullmatch(r"[!-~]{1,200}", plain):
        raise ValueError("must be the robot's signing secret: printable ASCII, without spaces")
    return SecretStr(plain)


def _address(value: object) -> SecretStr:
    """Validate an absolute http(s) address; it may hold a token, so no error shows it."""
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    wanted = 'must be an address like "https://host/path"'
    if not isinstance(plain, str) or len(plain) > 2048 or not plain.isprintable() or " " in plain:
        raise ValueError(wanted)
    try:
        url = URL(plain)
        port = url.port
    except ValueError:
        raise ValueError(wanted) from None
    if url.scheme not in ("http", "https") or not url.raw_host or not port:
        raise ValueError(wanted)
    if url.user is not None or url.password is not None:
        raise ValueError("must not hold a user or a password: receivers check the signature")
    if url.raw_fragment:
        raise ValueError("must not have a fragment")
    return SecretStr(plain)


def _event_patterns(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not matching_types([value]):
            near = get_close_matches(value, [*EventType, "batch.*", "endpoint.*"], 1)
            meant = f', did you mean "{near[0]}"?' if near else f": there are {', '.join(EventType)}"
            raise ValueError(f"{show(value)} matches no event{meant}")
    return values


def _accept(value: object) -> Accept:
    return value if isinstance(value, Accept) else parse_accept(text(value))


def _command(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values or not values[0] or any("\0" in value for value in values):
        raise ValueError('must name a program and its arguments, like ["/opt/on-verdict", "--live"]')
    return values


Name = Annotated[str, PlainValidator(matching(r"[A-Za-z0-9_-]{1,64}", "1 to 64 letters, digits, - and _"))]
Address = Annotated[SecretStr, PlainValidator(_address)]
Events = Annotated[tuple[Text, ...], AfterValidator(_event_patterns)]
Mobile = Annotated[str, PlainValidator(matching(r"[+0-9A-Za-z_-]{1,40}", "a mobile number"))]


class _Endpoint(Section):
    name: Name
    api_codes: tuple[Text, ...] = ()

    @property
    def place(self) -> str:
        """The section's name in messages."""
        return f"[[forward]] {self.name}"


class UrlEndpoint(_Endpoint):
    """A receiver over HTTP."""

    url: Address = Field(repr=False)
    secrets: tuple[Annotated[SecretStr, PlainValidator(webhook_secret)], ...] = Field(default=(), repr=False)
    events: Events = ("*",)
    format: Literal["standard", "cloudevents"] = "standard"
    accept: Annotated[Accept, PlainValidator(_accept)] = Accept("status")
    timeout: PositiveDuration = 20.0
    allowed_networks: Networks = ()
    ca_file: ReadableFile | None = None

    @property
    def kind(self) -> str:
        return "url"

    @property
    def target(self) -> str:
        """The address without its secrets."""
        return shown_address(self.url.get_secret_value())


class BotEndpoint(_Endpoint):
    """A robot in a group chat."""

    bot: Literal["dingtalk", "wecom", "feishu"]
    url: Address = Field(repr=False)
    secret: Annotated[SecretStr, PlainValidator(_bot_secret)] | None = Field(default=None, repr=False)
    events: Events = tuple(PROBLEMS)
    keyword: Text = ""
    mentions: tuple[Mobile, ...] = ()
    group_wait: Duration = 30.0
    repeat: PositiveDuration = 14_400.0
    language: Literal["zh", "en"] = "zh"
    timeout: PositiveDuration = 20.0
    allowed_networks: Networks = ()
    ca_file: ReadableFile | None = None

    @field_validator("secret")
    @classmethod
    def _where_it_is_used(cls, secret: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if secret is not None and info.data.get("bot") not in (None, *_BOT_SECRETS):
            raise ValueError(f"is not used by {info.data['bot']}: leave it out")
        return secret

    @property
    def kind(self) -> str:
        return self.bot

    @property
    def target(self) -> str:
        """The address without its token."""
        return shown_address(self.url.get_secret_value())


class CommandEndpoint(_Endpoint):
    """A program on this machine."""

    command: Annotated[tuple[Text, ...], AfterValidator(_command)]
    events: Events = ("*",)
    timeout: PositiveDuration = 30.0

    @property
    def kind(self) -> str:
        return "command"

    @property
    def target(self) -> str:
        """The program; its arguments may be secrets."""
        return self.command[0]


def _kind(value: Any) -> str:
    if isinstance(value, _Endpoint):
        return {"UrlEndpoint": "url", "BotEndpoint": "bot", "CommandEndpoint": "command"}[type(value).__name__]
    if isinstance(value, Mapping):
        if "command" in value:
            return "command"
        if "bot" in value:
            return "bot"
    return "url"


ForwardEndpoint = Annotated[
    Annotated[UrlEndpoint, Tag("url")]
    | Annotated[BotEndpoint, Tag("bot")]
    | Annotated[CommandEndpoint, Tag("command")],
    Discriminator(_kind),
]
KINDS: Mapping[str, type[_Endpoint]] = {"url": UrlEndpoint, "bot": BotEndpoint, "command": CommandEndpoint}


def _names_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [each.name for each in values]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f'the name "{twice}" is given twice: each endpoint has its own')
    if len(values) > MAX_ENDPOINTS:
        raise ValueError(f"must have at most {MAX_ENDPOINTS} endpoints, not {len(values)}")
    return values


Forward = Annotated[tuple[ForwardEndpoint, ...], AfterValidator(_names_once)]


def _api_code_pattern(value: object) -> str:
    pattern = value if isinstance(value, str) else ""
    if not 1 <= len(pattern) <= 50 or not pattern.isprintable() or pattern != pattern.strip():
        raise ValueError(f'{show(value)} is not an api_code: write 1 to 50 characters, with * for any, like "rent.*"')
    return pattern


def _quiet_table(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError('must be a table, like {"rent.*" = "24h"}')  # noqa: TRY004
    if len(value) > MAX_QUIET:
        raise ValueError(f"must have at most {MAX_QUIET} patterns, not {len(value)}")
    return value


class AlertConfig(Section):
    """`[alert]`: when people are warned. `expiring_before` 0 gives no warnings of files that end."""

    at_risk_after: PositiveDuration = 600.0
    expiring_before: Duration = 86_400.0
    quiet: Annotated[
        Mapping[Annotated[str, PlainValidator(_api_code_pattern)], PositiveDuration], BeforeValidator(_quiet_table)
    ] = Field(default_factory=dict)

    @property
    def quiet_limits(self) -> list[QuietLimit]:
        """How long the api_codes of each pattern may be silent."""
        return [QuietLimit(pattern, round(seconds * 1000)) for pattern, seconds in self.quiet.items()]


def shown_address(url: str) -> str:
    """Return an address without its query, and without path segments that may be a token, as it may be shown."""
    address = URL(url)
    segments = [part if len(part) < 20 else "…" for part in address.path.split("/")]
    shown = f"{address.scheme}://{address.host_port_subcomponent}{'/'.join(segments)}"
    return f"{shown}?…" if address.raw_query_string else shown


def warnings(endpoints: tuple[UrlEndpoint | BotEndpoint | CommandEndpoint, ...], public_url: str | None) -> list[str]:
    """Return a line for each key of an endpoint that works, but probably not as intended."""
    lines = []
    if public_url is None and any(isinstance(each, BotEndpoint) for each in endpoints):
        lines.append("server.public_url: none, so messages have no link to the batch: set the dashboard's address")
    for number, each in enumerate(endpoints):
        if isinstance(each, UrlEndpoint) and not each.secrets:
            example = "whsec_" + base64.b64encode(b"24 random bytes, or more").decode()[:8]
            lines.append(
                f"forward[{number}].secrets: none, so {each.name} cannot verify the sender: "
                f'add one, like secrets = ["{example}…"]'
            )
        if isinstance(each, UrlEndpoint) and each.url.get_secret_value().startswith("http://"):
            lines.append(f"forward[{number}].url: is not https, so payloads of {each.name} can be read on the way")
        if isinstance(each, BotEndpoint) and each.bot in _BOT_SECRETS and each.secret is None and not each.keyword:
            lines.append(
                f"forward[{number}].secret: none, and no keyword, so the {each.bot} robot must allow "
                "this server's IP address"
            )
        if isinstance(each, BotEndpoint):
            lines += _robot_warnings(number, each)
    return lines


def _robot_warnings(number: int, endpoint: BotEndpoint) -> list[str]:
    """Return what is wrong with the address of a robot at its vendor; nothing is known of other addresses (relays)."""
    url = URL(endpoint.url.get_secret_value())
    bot, token = _ROBOT_HOSTS.get(url.host or "", (endpoint.bot, None))
    if bot != endpoint.bot:
        return [f'forward[{number}].bot: is {endpoint.bot}, but {url.host} is the address of {bot}: set bot = "{bot}"']
    if token is not None and not url.query.get(token):
        return [f"forward[{number}].url: has no {token}: copy the whole address that the robot's settings show"]
    return []


def robot_of(url: str) -> str | None:
    """Return whose robot an address is, by its vendor's host; None when it is another receiver's."""
    try:
        return _ROBOT_HOSTS.get(URL(url).host or "", (None, None))[0]
    except ValueError:
        return None
