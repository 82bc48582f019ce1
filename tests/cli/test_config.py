"""`config check`, `config show` and `config init`, as a user runs them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import notify_server
from notify_server.config import Config, load_config
from tests.support.daemon import Finished, clean_environment, run_command

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-nobody-may-see"
WRITTEN = f"""
[server]
port = 9000
[auth]
callback_token = "{TOKEN}"
timestamp_window = 1.5
nonce_ttl = 90
[verify]
accept_status = [204, "300-302"]
allowed_networks = ["10.0.0.0/8", "fd00::/8"]
retry_schedule = ["250ms", "90s", "1d"]
[verify.hosts."*.example.com"]
timeout = "1m"
methods = ["GET"]
headers = {{ "X-Key" = "{TOKEN}" }}
[alert]
quiet = {{ "rent.*" = "24h", "sale.room" = "90s" }}
"""


async def config(folder: Path, *arguments: str, **variables: str) -> Finished:
    return await run_command("config", *arguments, cwd=folder, environ=clean_environment(**variables))


async def test_valid_values_are_shown_with_their_source(tmp_path: Path) -> None:
    end = await config(tmp_path, "check")
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout == (
        "file: none, config.toml is not there\nenvironment: none\n"
        "register with the platform: http://127.0.0.1:8080/notify\nConfiguration OK.\n"
    )
    (tmp_path / "config.toml").write_text(WRITTEN)
    end = await config(tmp_path, "check", NOTIFY_SERVER__LOG__LEVEL="debug", notify_server__server__port="1")
    assert end.stdout.startswith(
        "file: config.toml\nenvironment: NOTIFY_SERVER__LOG__LEVEL, notify_server__server__port\n"
    )


async def test_every_wrong_key_is_reported_on_its_own_line_with_exit_2(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('[server]\nport = 99999\n[verify]\ntimout = "1s"\n')
    end = await config(tmp_path, "check", "--config", "other.toml", NOTIFY_SERVER__LOG__LEVEL="loud")
    assert (end.code, end.stdout) == (2, "")
    assert end.stderr.splitlines() == [
        "[server] port: must be from 0 to 65535, not 99999",
        '[verify] timout: unknown key, did you mean "timeout"?',
        'environment NOTIFY_SERVER__LOG__LEVEL: must be "debug", "info", "warning" or "error", not "loud"',
    ]


async def test_shown_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(WRITTEN)
    end = await config(tmp_path, "show", NOTIFY_SERVER__ACK__BODY='"{request_id}" 好\x7f\n')
    assert (end.code, end.stderr) == (0, "")
    assert TOKEN not in end.stdout
    shown = tmp_path / "shown.toml"
    shown.write_text(end.stdout.replace("…(set)", TOKEN))
    wanted = load_config(path, environ={"NOTIFY_SERVER__ACK__BODY": '"{request_id}" 好\x7f\n'})
    assert load_config(shown, environ={}) == wanted


async def test_every_key_is_shown_with_its_source(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(WRITTEN)
    end = await config(tmp_path, "show", notify_server__Server__Host="0.0.0.0")
    lines = end.stdout.splitlines()
    assert 'host = "0.0.0.0"  # environment notify_server__Server__Host' in lines
    assert "port = 9000  # config.toml" in lines
    assert 'callback_path = "/notify"  # default' in lines
    assert 'callback_token = "…(set)"  # config.toml' in lines
    assert "# admin_token is not set" in lines
    assert 'retry_schedule = ["250ms", "90s", "1d"]  # config.toml' in lines
    assert 'nonce_ttl = "90s"  # config.toml' in lines
    assert '[verify.hosts."*.example.com"]  # config.toml' in lines
    for section, model in Config():
        if section == "forward":
            continue
        assert f"[{section}]" in lines
        for key in set(type(model).model_fields) - {"hosts", "usable"}:
            assert re.search(rf"^{key} = |^# {key} is not set$", end.stdout, re.M), key
    assert "[verify.usable]" in lines
    assert 'archived = "fail"  # default' in lines


async def test_a_key_of_a_table_is_set_by_a_variable_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[verify.usable]\nempty = "off"\nsniff = "all"\n')
    variables = {"NOTIFY_SERVER__VERIFY__USABLE__EMPTY": "flag", "NOTIFY_SERVER__VERIFY__USABLE__EXPECT": "image/*"}
    end = await config(tmp_path, "show", **variables)
    lines = end.stdout.splitlines()
    assert 'empty = "flag"  # environment NOTIFY_SERVER__VERIFY__USABLE__EMPTY' in lines
    assert 'expect = ["image/*"]  # environment NOTIFY_SERVER__VERIFY__USABLE__EXPECT' in lines
    assert 'sniff = "all"  # config.toml' in lines


async def test_a_wrong_key_of_a_table_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[verify.usable]\nempti = "off"\nsniff = "some"\n')
    variables = {"NOTIFY_SERVER__VERIFY__USABLE__EMPTY": "no", "NOTIFY_SERVER__VERIFY__USABLE__EXPCT": "image/*"}
    end = await config(tmp_path, "check", **variables)
    assert end.code == 2
    for line in (
        'environment NOTIFY_SERVER__VERIFY__USABLE__EXPCT: unknown key, did you mean "expect"?',
        'environment NOTIFY_SERVER__VERIFY__USABLE__EMPTY: must be "fail", "flag" or "off", not "no"',
        '[verify.usable] sniff: must be "off", "doubtful" or "all", not "some"',
        '[verify.usable] empti: unknown key, did you mean "empty"?',
    ):
        assert line in end.stderr


async def test_as_json_it_shows_the_same(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(WRITTEN)
    end = await config(tmp_path, "show", "--json", "--config", "c.toml")
    shown: dict[str, Any] = json.loads(end.stdout)
    assert shown["file"] == "c.toml"
    assert TOKEN not in end.stdout
    settings = shown["settings"]
    assert settings.keys() == {*Config.model_fields, "verify.usable"}
    assert settings["auth"]["callback_token"] == {"value": "…(set)", "source": "c.toml"}
    assert settings["auth"]["admin_token"] == {"value": None, "source": "default"}
    assert settings["verify"]["accept_status"] == {"value": ["204", "300-302"], "source": "c.toml"}
    assert settings["verify"]["jitter"]["value"] == 0.2
    assert settings["verify"]["hosts"]["value"] == {
        "*.example.com": {"headers": {"X-Key": "…(set)"}, "methods": ["GET"], "timeout": "1m"}
    }


async def test_the_example_is_written_once_for_its_owner_only(tmp_path: Path) -> None:
    end = await config(tmp_path, "init")
    written = tmp_path / "config.toml"
    assert (end.code, end.stderr) == (0, "")
    assert written.read_bytes() == (ROOT / "config.example.toml").read_bytes()
    assert written.stat().st_mode & 0o777 == 0o600
    assert (await config(tmp_path, "check")).code == 0
    written.write_text("# mine\n")
    end = await config(tmp_path, "init")
    assert (end.code, end.stdout) == (1, "")
    assert end.stderr == "notify_server: config.toml: exists already and is left unchanged: name another\n"
    assert written.read_text() == "# mine\n"


async def test_the_example_can_be_written_elsewhere_and_an_unwritable_path_is_reported(tmp_path: Path) -> None:
    assert (await config(tmp_path, "init", "other.toml")).code == 0
    assert tomllib.loads((tmp_path / "other.toml").read_text())["server"]["port"] == 8080
    end = await config(tmp_path, "init", "no/such/folder.toml")
    assert (end.code, end.stderr) == (
        1,
        "notify_server: no/such/folder.toml: cannot be written (No such file or directory)\n",
    )


def test_the_example_that_is_installed_is_the_one_at_the_top() -> None:
    installed = Path(notify_server.__file__).with_name("config.example.toml")
    assert installed.is_symlink()
    assert installed.resolve() == ROOT / "config.example.toml"
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert installed.name in package_data["notify_server"]


@pytest.mark.parametrize("key", ["callback_token", "admin_token"])
async def test_no_secret_of_the_environment_is_shown(tmp_path: Path, key: str) -> None:
    variable = f"NOTIFY_SERVER__AUTH__{key.upper()}"
    for arguments in (["show"], ["show", "--json"], ["check"]):
        end = await config(tmp_path, *arguments, **{variable: TOKEN})
        assert end.code == 0
        assert variable in end.stdout
        assert TOKEN not in end.stdout + end.stderr


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hidden@db/d",
        "postgresql://u:p%40hidden@db/d",
        "postgresql://u:p@hidden@db/d",
        "postgresql://db/d?user=u&password=hidden",
        "postgresql://db/d?user=u&password=a@hidden",
        "postgresql://u@db/d?sslmode=require&sslkey=/k&sslpassword=hidden",
        "postgresql:///d?host=/run/postgresql&passfile=/hidden",
        "postgresql://db/d?options=-c%20x.y=hidden",
        "postgresql://u:x/hidden@db/d",
        "postgresql://u:hidden#x@db/d",
        "postgresql://u:hidden?x@db/d",
    ],
)
@pytest.mark.parametrize("command", [("config", "show"), ("config", "show", "--json"), ("config", "check")])
async def test_no_spelling_of_a_password_in_the_stores_address_is_shown(
    tmp_path: Path, url: str, command: tuple[str, ...]
) -> None:
    environ = clean_environment(NOTIFY_SERVER__STORE__URL=url)
    end = await run_command(*command, cwd=tmp_path, environ=environ)
    assert "hidden" not in end.stdout + end.stderr
    assert end.code == 0 or "[store]" in end.stderr or "STORE__URL" in end.stderr


@pytest.mark.parametrize("command", [("config", "show"), ("config", "show", "--json"), ("config", "check")])
@pytest.mark.parametrize("host", ["files.example.com", "not a host"])
async def test_password_of_the_proxy_and_headers_are_not_shown(
    tmp_path: Path, command: tuple[str, ...], host: str
) -> None:
    """Row 126; the second host makes the section wrong."""
    (tmp_path / "config.toml").write_text(
        "[verify]\nproxy = 'http://company:hidden-1@proxy.example.com:3128'\n"
        f'[verify.hosts."{host}"]\nheaders = {{ Authorization = "Bearer hidden-2" }}\n'
    )
    end = await run_command(*command, cwd=tmp_path)
    assert "hidden" not in end.stdout + end.stderr
    assert (end.code == 0) == (host == "files.example.com")
    if end.code == 0 and command[1] == "show":
        assert "http://…@proxy.example.com:3128" in end.stdout


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("proxy = 'socks5://hidden@proxy.example.com:1080'", "proxy"),
        ("proxy = 'http://user:hid/den@proxy.example.com:3128'", "proxy"),
        ("proxy = 'http://hidden@proxy.example.com'", "proxy"),
        ("[verify.hosts.'a.example.com']\nheaders = { Host = 'hidden' }", "headers"),
        ("[verify.hosts.'a.example.com']\nheaders = { 'A b' = 'hidden' }", "headers"),
        ('[verify.hosts."a.example.com"]\nheaders = { A = "hid\\r\\nden: x" }', "headers"),
        ("headers = { Authorization = 'hidden' }", "headers"),
    ],
)
async def test_proxy_or_header_that_cannot_work_is_refused_by_name(tmp_path: Path, line: str, key: str) -> None:
    """Row 126."""
    (tmp_path / "config.toml").write_text(f"[verify]\n{line}\n")
    end = await run_command("config", "check", cwd=tmp_path)
    assert (end.code, end.stdout) == (2, "")
    assert end.stderr.startswith("[verify") and key in end.stderr
    assert "hid" not in end.stderr


@pytest.mark.parametrize("token", ["abc&def-ghi", "abc#def-ghi", "&&&&&&&&"])
async def test_token_that_cannot_stand_in_the_registered_address_is_refused_and_not_shown(
    tmp_path: Path, token: str
) -> None:
    """Row 104."""
    (tmp_path / "config.toml").write_text(f"[auth]\ncallback_token = '{token}'\n")
    end = await run_command("config", "check", cwd=tmp_path)
    assert (end.code, end.stdout) == (2, "")
    assert end.stderr.startswith("[auth] callback_token: must not contain & or #") and token not in end.stderr


async def test_check_prints_the_address_to_register_without_the_token(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        "[server]\npublic_url = 'https://example.com/files/'\n[auth]\ncallback_token = 'abc+def/ghi=='\n"
    )
    end = await run_command("config", "check", cwd=tmp_path)
    assert "register with the platform: https://example.com/files/notify?token=<callback_token>\n" in end.stdout
    assert "abc+def" not in end.stdout
