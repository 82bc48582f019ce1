"""The HTTP client and scripts against real sockets and processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_network
from pathlib import Path

import pytest

from notify_server.clock import unix_ms
from notify_server.forward.client import Answer as Answered
from notify_server.forward.client import EndpointClient
from notify_server.forward.outcome import Attempt
from notify_server.forward.script import MAX_AT_ONCE, Scripts
from tests.support.origin import SILENCE, Answer, Origin
from tests.support.waiting import eventually, free_port

LOOPBACK = "127.0.0.0/8"
Post = Callable[..., Awaitable[Answered]]


@pytest.fixture
async def post() -> AsyncIterator[Post]:
    clients: list[EndpointClient] = []

    async def send(url: str, *, networks: tuple[str, ...] = (LOOPBACK,), timeout: float = 10.0) -> Answered:
        client = EndpointClient(
            timeout=timeout,
            allowed_networks=[ip_network(each) for each in networks],
            ca_file=None,
            user_agent="notify-server/test",
            now=unix_ms,
            place="[[forward]] listings",
        )
        clients.append(client)
        return await client.post(url, b'{"type":"x"}', {"webhook-id": "evt_a"})

    yield send
    for client in clients:
        await client.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Origin]:
    async with Origin() as origin:
        yield origin


async def test_body_and_headers_arrive(post: Post, receiver: Origin) -> None:
    answer = await post(receiver.url("/hook"))
    (hit,) = receiver.hits
    assert (answer.status, answer.error) == (200, None)
    assert (hit.method, hit.path) == ("POST", "/hook")
    assert hit.headers["content-type"] == "application/json"
    assert hit.headers["webhook-id"] == "evt_a"
    assert hit.headers["user-agent"] == "notify-server/test"
    assert hit.headers["content-length"] == "12"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
async def test_private_address_is_not_dialled(post: Post, receiver: Origin, host: str) -> None:
    answer = await post(f"http://{host}:{receiver.port}/", networks=())
    assert answer.status is None
    assert "is a private address: allow it in [[forward]] listings allowed_networks" in str(answer.error)
    assert receiver.connections == 0


async def test_name_that_resolves_to_an_allowed_address_is_dialled(post: Post, receiver: Origin) -> None:
    answer = await post(f"http://localhost:{receiver.port}/", networks=(LOOPBACK, "::1/128"))
    assert answer.status == 200


async def test_redirect_is_returned_and_not_followed(post: Post, receiver: Origin) -> None:
    receiver.on("/a", Answer(307, {"Location": receiver.url("/b")}))
    assert (await post(receiver.url("/a"))).status == 307
    assert receiver.count["/b"] == 0


async def test_cookies_are_not_kept_and_proxies_of_the_environment_not_used(
    post: Post, receiver: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    receiver.default = Answer(200, {"Set-Cookie": "a=b"})
    for _ in range(2):
        assert (await post(receiver.url("/"))).status == 200
    assert all("cookie" not in hit.headers for hit in receiver.hits)


async def test_two_kilobytes_of_an_endless_answer_are_kept(post: Post, receiver: Origin) -> None:
    receiver.on("/", Answer(raw=b"HTTP/1.1 500 X\r\n\r\n" + b"x" * 5000, later=((3600, b"y"),)))
    answer = await post(receiver.url("/"))
    assert (answer.status, answer.body) == (500, b"x" * 2048)


async def test_answer_is_made_printable(post: Post, receiver: Origin) -> None:
    receiver.on("/", Answer(200, body=b"ok\x1b[31m\x00\xff\r\nline"))
    assert (await post(receiver.url("/"))).text == "ok\ufffd[31m\ufffd\ufffd\nline"


async def test_silent_receiver_ends_in_a_timeout(post: Post, receiver: Origin) -> None:
    receiver.on("/", SILENCE)
    answer = await post(receiver.url("/"), timeout=0.2)
    assert (answer.status, answer.error) == (None, "no answer within the timeout")


async def test_errors_do_not_show_the_address(post: Post, receiver: Origin) -> None:
    receiver.on("/x", Answer(raw=b"nonsense\r\n\r\n", close=True))
    receiver.on("/y", Answer(raw=b"", reset=True))
    for path in ("/x?token=hush-hush", "/x", "/y"):
        answer = await post(receiver.url(path) if "?" not in path else receiver.url("/x") + "?token=hush-hush")
        assert "hush" not in str(answer.error)
    refused = await post(f"http://127.0.0.1:{free_port()}/?token=hush-hush")
    assert refused.error is not None
    assert "cannot connect" in refused.error
    assert "hush" not in refused.error
    unknown = await post("http://no-such-name.invalid/?token=hush-hush")
    assert unknown.error == "the name cannot be resolved"


async def test_retry_after_is_read(post: Post, receiver: Origin) -> None:
    receiver.on("/", Answer(429, {"Retry-After": "7"}))
    assert (await post(receiver.url("/"))).retry_after_ms == 7_000


# Scripts


async def run(tmp_path: Path, code: str, *, limit: float = 20.0, body: bytes = b"{}") -> Attempt:
    script = tmp_path / "script.py"
    script.write_text(code)
    return await Scripts().run([sys.executable, str(script)], limit, kind="batch.complete", key="evt_a", body=body)


async def test_body_is_on_standard_input_and_exit_0_is_delivered(tmp_path: Path) -> None:
    attempt = await run(tmp_path, "import sys; print(sys.stdin.read())", body=b'{"a":1}')
    assert (attempt.status, attempt.error, attempt.response) == (0, None, '{"a":1}\n')


async def test_environment_is_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SERVER__AUTH__ADMIN_TOKEN", "hush-hush")
    monkeypatch.setenv("LC_CTYPE", "C.UTF-8")
    attempt = await run(
        tmp_path, "import os; print(sorted(os.environ), os.environ['NOTIFY_TYPE'], os.environ['NOTIFY_ID'])"
    )
    names = {"PATH", "LANG", "TZ"} & set(os.environ) | {"NOTIFY_TYPE", "NOTIFY_ID"}
    # Python itself sets LC_CTYPE when it finds the C locale.
    listed = attempt.response or ""
    assert set(listed.partition("]")[0].strip("['").split("', '")) - {"LC_CTYPE"} == names
    assert listed.endswith("batch.complete evt_a\n")


async def test_other_exit_codes_and_signals_are_failures(tmp_path: Path) -> None:
    assert (await run(tmp_path, "raise SystemExit(3)")).error == "exit code 3"
    assert (await run(tmp_path, "import os; os.kill(os.getpid(), 9)")).error == "ended by signal 9"
    missing = await Scripts().run([str(tmp_path / "none")], 1.0, kind="t", key="k", body=b"")
    assert missing.error == f"cannot run {tmp_path / 'none'}: No such file or directory"


async def test_script_is_killed_with_its_children_after_its_time(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(3600)\n"
    )
    attempt = await run(tmp_path, code, limit=2.0)
    assert attempt.error == "killed: still running after 2 s"
    assert attempt.response is not None
    child = int(attempt.response)
    await eventually(lambda: _is_gone(child))


async def test_script_whose_child_holds_its_output_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
        "print('done', flush=True)\n"
    )
    async with asyncio.timeout(20):
        attempt = await run(tmp_path, code, limit=3600.0)
    assert (attempt.error, attempt.response) == (None, "done\n")


async def test_two_kilobytes_of_output_are_kept(tmp_path: Path) -> None:
    attempt = await run(tmp_path, "print('x' * 500_000)")
    assert (attempt.error, attempt.response) == (None, "x" * 2048)


async def test_script_need_not_read_its_input(tmp_path: Path) -> None:
    assert (await run(tmp_path, "", body=b"x" * 1_000_000)).error is None


async def test_at_most_four_scripts_run_at_once(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = (
        "import os, pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / f'up-{os.getpid()}').touch()\n"
        "while not (here / 'go').exists(): time.sleep(0.01)\n"
        "(here / f'up-{os.getpid()}').unlink()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    scripts = Scripts()
    tasks = [
        asyncio.create_task(scripts.run([sys.executable, str(script)], 60.0, kind="t", key="k", body=b""))
        for _ in range(MAX_AT_ONCE + 3)
    ]
    await eventually(lambda: len(list(tmp_path.glob("up-*"))) == MAX_AT_ONCE)
    go.touch()
    assert all(attempt.delivered for attempt in await asyncio.gather(*tasks))


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True
