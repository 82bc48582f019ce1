"""`notify-server init`: six questions, and a configuration that can be served from."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from notify_server.config import Config, load_config
from tests.support.cli import running
from tests.support.daemon import Finished
from tests.support.waiting import free_port

ROBOT = "https://oapi.dingtalk.com/robot/send?access_token=0123456789"


async def answer(folder: Path, *answers: str) -> Finished:
    async with running("init", cwd=folder) as process:
        stdout, stderr = await process.communicate("".join(f"{each}\n" for each in answers).encode())
        assert process.returncode is not None
        return Finished(process.returncode, stdout.decode(), stderr.decode(), process.pid)


def written(folder: Path) -> Config:
    return load_config(folder / "config.toml", environ={})


def secret(value: Any) -> str:
    return str(value.get_secret_value())


async def test_enter_six_times_makes_tokens_and_leaves_the_rest_at_its_default(tmp_path: Path) -> None:
    done = await answer(tmp_path, *[""] * 6)
    assert (done.code, done.stderr) == (0, "")
    config = written(tmp_path)
    token, admin = secret(config.auth.callback_token), secret(config.auth.admin_token)
    assert len(token) == len(admin) == 48
    assert token != admin
    assert (config.server, config.verify, config.store, config.forward) == (
        Config().server,
        Config().verify,
        Config().store,
        (),
    )
    assert f"http://127.0.0.1:8080/notify?token={token}\n" in done.stdout
    assert admin not in done.stdout
    assert stat.S_IMODE((tmp_path / "config.toml").stat().st_mode) == 0o600


async def test_every_answer_is_written_and_the_address_to_register_is_shown(tmp_path: Path) -> None:
    done = await answer(
        tmp_path,
        "https://files.localhost/hooks/oss",
        "a-token-of-ours",
        "10.0.0.0/8, 192.168.0.0/16",
        ROBOT,
        "SEC0123456789",
        "an-admin-token",
        "",
    )
    assert done.code == 0, done.stderr
    assert "https://files.localhost/hooks/oss?token=a-token-of-ours\n" in done.stdout
    assert "http://127.0.0.1:8080" in done.stdout
    assert "notify-server forward test dingtalk" in done.stdout
    config = written(tmp_path)
    assert (config.server.host, config.server.public_url) == (Config().server.host, "https://files.localhost")
    assert config.server.callback_path == "/hooks/oss"
    assert [str(network) for network in config.server.trusted_proxies] == ["127.0.0.1/32", "::1/128"]
    assert [str(network) for network in config.verify.allowed_networks] == ["10.0.0.0/8", "192.168.0.0/16"]
    (endpoint,) = config.forward
    assert (endpoint.kind, endpoint.name) == ("dingtalk", "dingtalk")
    for hidden in ("SEC0123456789", "an-admin-token", "access_token=0123456789"):
        assert hidden not in done.stdout


async def test_a_port_in_the_address_is_listened_on_and_a_receiver_gets_a_secret(tmp_path: Path) -> None:
    hook = f"http://127.0.0.1:{free_port()}/hook"
    done = await answer(tmp_path, "http://localhost:8123/", "", "", hook, "", "")
    assert done.code == 0, done.stderr
    config = written(tmp_path)
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8123)
    (endpoint,) = config.forward
    assert endpoint.kind == "url"
    # The address is private, which the endpoint has to allow.
    assert "allowed_networks" in done.stdout


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (0, "notify.example.com", "must be an address like"),
        (0, "https://[::1", "must be an address like"),
        (1, "short", "callback_token: must be at least 8"),
        (2, "10.0.0.0/33", "is not a network"),
        (3, "ftp://listing.internal/", "must be an address like"),
        (4, "with a space", "admin_token: must be"),
        (5, "mysql://host/db", "[store] url"),
        (5, "postgresql://127.0.0.1:9/db", "cannot be reached"),
    ],
)
async def test_a_wrong_answer_is_explained_and_the_question_repeated(
    tmp_path: Path, place: int, wrong: str, said: str
) -> None:
    answers = [""] * 6
    answers.insert(place, wrong)
    done = await answer(tmp_path, *answers)
    assert (done.code, done.stderr) == (0, "")
    assert said in done.stdout
    assert done.stdout.count(f"{place + 1}. ") == 2
    assert (tmp_path / "config.toml").exists()


async def test_a_file_that_is_there_is_left_as_it_is_and_nothing_is_asked(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[server]\nport = 1\n")
    done = await answer(tmp_path)
    assert done.code == 1
    assert "exists already" in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "config.toml").read_text() == "[server]\nport = 1\n"


async def test_an_end_of_the_answers_writes_nothing(tmp_path: Path) -> None:
    done = await answer(tmp_path, "", "")
    assert done.code == 130
    assert list(tmp_path.iterdir()) == []
