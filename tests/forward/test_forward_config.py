"""`[[forward]]`: valid tables, refusals that name the key, and that no secret is ever shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from notify_server.config import Config, load_config
from notify_server.config.forward import BotEndpoint, CommandEndpoint, UrlEndpoint, warnings
from notify_server.errors import ConfigError
from notify_server.events.payload import PROBLEMS
from notify_server.expect.quiet import QuietLimit

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
URL = {"name": "a", "url": "https://listing.internal/hooks?token=hush-hush"}
BOT = {"name": "b", "bot": "dingtalk", "url": "https://oapi.dingtalk.com/robot/send?access_token=hush-hush"}
COMMAND = {"name": "c", "command": ["/bin/true", "--password=hush-hush"]}


def load(tmp_path: Path, text: str, **environ: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text, "utf-8")
    return load_config(path, environ=environ)


def problems(tmp_path: Path, *endpoints: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_config(None, environ={"NOTIFY_SERVER__FORWARD": json.dumps(endpoints)}, cwd=tmp_path)
    assert "hush-hush" not in str(refused.value)
    return list(refused.value.problems)


def test_documented_sections_are_read(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f"""
[[forward]]
name = "listings"
url = "https://listing.internal/hooks/files"
secrets = ["{SECRET}"]
events = ["batch.*"]
accept = "json:code=000"
allowed_networks = ["10.0.0.0/8"]
[[forward]]
name = "on-call"
bot = "dingtalk"
url = "https://oapi.dingtalk.com/robot/send?access_token=abc"
secret = "SECabc"
mentions = ["13800000000"]
[[forward]]
name = "script"
command = ["/opt/on-verdict", "--live"]
[alert]
at_risk_after = "5m"
quiet = {{"rent.*" = "24h", sale = 90}}
""",
    )
    url, bot, command = config.forward
    assert isinstance(url, UrlEndpoint)
    assert isinstance(bot, BotEndpoint)
    assert isinstance(command, CommandEndpoint)
    assert (url.events, url.timeout, url.format, str(url.accept)) == (("batch.*",), 20.0, "standard", "json:code=000")
    assert (bot.events, bot.group_wait, bot.repeat, bot.language) == (tuple(PROBLEMS), 30.0, 14_400.0, "zh")
    assert (command.timeout, command.events) == (30.0, ("*",))
    assert config.alert.at_risk_after == 300.0
    assert config.alert.quiet_limits == [QuietLimit("rent.*", 86_400_000), QuietLimit("sale", 90_000)]


def test_environment_gives_the_list_as_json(tmp_path: Path) -> None:
    config = load(tmp_path, "", NOTIFY_SERVER__FORWARD=json.dumps([URL, BOT, COMMAND]))
    assert [each.name for each in config.forward] == ["a", "b", "c"]


def test_nothing_is_forwarded_by_default(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert config.forward == ()
    assert config.alert.at_risk_after == 600.0
    assert config.alert.quiet_limits == []


@pytest.mark.parametrize(
    ("quiet", "problem"),
    [
        ('"24h"', 'quiet: must be a table, like {"rent.*" = "24h"}'),
        ('{"rent.*" = "soon"}', 'quiet "rent.*": "soon" is not a duration'),
        ("{a = 0}", "quiet a: must be more than 0"),
        ('{"" = 1}', 'quiet "": "" is not an api_code: write 1 to 50 characters, with * for any, like "rent.*"'),
        ('{" a" = 1}', 'quiet " a": " a" is not an api_code'),
        ('{"a\\u0000" = 1}', "is not an api_code"),
        (f'{{"{"a" * 51}" = 1}}', "is not an api_code"),
        (f"{{{', '.join(f'a{n} = 1' for n in range(101))}}}", "quiet: must have at most 100 patterns, not 101"),
    ],
)
def test_wrong_quiet_is_named(tmp_path: Path, quiet: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"[alert]\nquiet = {quiet}\n")
    assert str(caught.value).startswith("[alert] quiet")
    assert problem in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_environment_gives_quiet_as_json(tmp_path: Path) -> None:
    config = load(tmp_path, "", NOTIFY_SERVER__ALERT__QUIET='{"rent.*": "24h"}')
    assert config.alert.quiet == {"rent.*": 86_400.0}


def test_repr_shows_no_secret(tmp_path: Path) -> None:
    config = load(
        tmp_path, "", NOTIFY_SERVER__FORWARD=json.dumps([URL | {"secrets": [SECRET]}, BOT | {"secret": "SECx"}])
    )
    shown = f"{config!r} {config} {[each.target for each in config.forward]}"
    for secret in ("hush-hush", SECRET, "SECx"):
        assert secret not in shown


@pytest.mark.parametrize(
    ("endpoint", "place", "what"),
    [
        (URL | {"secrets": ["whsec_hush-hush"]}, "forward[0].secrets[0]", "must be whsec_"),
        (URL | {"secrets": "hush-hush"}, "forward[0].secrets", "must be a list"),
        (URL | {"name": "a b"}, "forward[0].name", "letters"),
        ({"url": URL["url"]}, "forward[0].name", "is needed"),
        ({"name": "a"}, "forward[0].url", "is needed"),
        (URL | {"url": "ftp://hush-hush"}, "forward[0].url", "must be an address"),
        (URL | {"url": "https://u:hush-hush@h/"}, "forward[0].url", "user"),
        (URL | {"url": "https://h/#hush-hush"}, "forward[0].url", "fragment"),
        (URL | {"events": ["batch.compleet"]}, "forward[0].events", 'did you mean "batch.complete"'),
        (URL | {"format": "xml"}, "forward[0].format", "must be"),
        (URL | {"accept": "regex"}, "forward[0].accept", "must be"),
        (URL | {"timeout": 0}, "forward[0].timeout", "more than 0"),
        (URL | {"allowed_networks": ["10.0.0.1/8"]}, "forward[0].allowed_networks[0]", '"10.0.0.0/8"'),
        (URL | {"ca_file": "/nowhere/ca.pem"}, "forward[0].ca_file", "cannot read"),
        (URL | {"secret": "hush-hush"}, "forward[0].secret", 'did you mean "secrets"'),
        (BOT | {"bot": "slack"}, "forward[0].bot", "must be"),
        (BOT | {"bot": "wecom", "secret": "hush-hush"}, "forward[0].secret", "not used by wecom"),
        (BOT | {"secret": "hush-hush \n"}, "forward[0].secret", "printable"),
        (BOT | {"mentions": ["a b"]}, "forward[0].mentions[0]", "mobile"),
        (BOT | {"language": "fr"}, "forward[0].language", "must be"),
        (COMMAND | {"command": []}, "forward[0].command", "must name a program"),
        (COMMAND | {"command": "/bin/true hush-hush"}, "forward[0].command", "must be a list"),
        (COMMAND | {"url": "https://hush-hush"}, "forward[0].url", "unknown key"),
        ("text", "forward[0]", "must be a table"),
    ],
)
def test_wrong_entry_is_named(tmp_path: Path, endpoint: object, place: str, what: str) -> None:
    (problem,) = problems(tmp_path, endpoint)
    assert problem.startswith(f"{place}: ")
    assert what in problem


def test_entry_is_counted_from_zero_and_each_problem_has_a_line(tmp_path: Path) -> None:
    found = problems(tmp_path, URL, BOT | {"secret": " hush-hush", "group_wait": "soon"})
    assert [line.partition(":")[0] for line in found] == ["forward[1].secret", "forward[1].group_wait"]


def test_same_name_twice_is_refused(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, URL, COMMAND | {"name": "a"})
    assert problem.startswith("forward: ")
    assert '"a" is given twice' in problem


def test_forward_that_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, '[forward]\nname = "a"\n')
    assert refused.value.problems == ("forward: must be a list of tables: write [[forward]]",)


def test_unsigned_endpoint_is_warned_about(tmp_path: Path) -> None:
    config = load(tmp_path, "", NOTIFY_SERVER__FORWARD=json.dumps([URL, URL | {"name": "s", "secrets": [SECRET]}, BOT]))
    found = warnings(config.forward, "https://n.example.com")
    assert [line.partition(":")[0] for line in found] == ["forward[0].secrets", "forward[2].secret"]


def test_bot_without_an_address_for_links_is_warned_about(tmp_path: Path) -> None:
    config = load(tmp_path, "", NOTIFY_SERVER__FORWARD=json.dumps([BOT | {"keyword": "files"}]))
    (line,) = warnings(config.forward, None)
    assert line.startswith("server.public_url: none")
    assert warnings((), None) == []


@pytest.mark.parametrize(
    ("bot", "url", "found"),
    [
        ("dingtalk", "https://oapi.dingtalk.com/robot/send?access_token=t", []),
        ("dingtalk", "https://relay.internal/robot", []),
        ("feishu", "https://open.larksuite.com/open-apis/bot/v2/hook/t", []),
        ("wecom", "https://qyapi.weixin.qq.com/cgi-bin/webhook/send", ["forward[0].url: has no key"]),
        ("dingtalk", "https://oapi.dingtalk.com/robot/send?access_token=", ["forward[0].url: has no access_token"]),
        ("feishu", "https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=k", ["forward[0].bot: is feishu"]),
    ],
)
def test_address_of_a_robot_that_cannot_work_is_warned_about(bot: str, url: str, found: list[str]) -> None:
    config = Config(forward=[{"name": "a", "bot": bot, "url": url, "keyword": "files"}])  # type: ignore[arg-type]
    assert [line.partition(",")[0].partition(": copy")[0] for line in warnings(config.forward, "https://n")] == found
