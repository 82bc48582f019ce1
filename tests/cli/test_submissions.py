"""`expect` and `reconcile` against a running daemon."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.daemon import Daemon, clean_environment, run_command
from tests.support.notification import API_CODE


async def test_submissions_are_registered_and_reconciled(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        (tmp_path / "submitted.csv").write_text(
            "reference;batch_id;files\nr1;b1;1\nr2;b2;3\nr3;b3;\nr4;;1\n", encoding="utf-8-sig"
        )
        arguments = ("-f", "submitted.csv", "--api-code", API_CODE)
        token = (tmp_path / "admin_token").read_text().strip()
        environ = clean_environment(NOTIFY_SERVER__AUTH__ADMIN_TOKEN=token)
        address = ("--url", daemon.url)
        end = await run_command("expect", *arguments, *address, "--notify-within", "1h", cwd=tmp_path, environ=environ)
        assert (end.code, end.stdout) == (0, "4 submissions are registered, 0 were before\n"), end.stderr
        end = await run_command("expect", *arguments, *address, "--notify-within", "1h", cwd=tmp_path, environ=environ)
        assert (end.code, end.stdout) == (0, "0 submissions are registered, 4 were before\n")
        end = await run_command("expect", *arguments, *address, "--notify-within", "2h", cwd=tmp_path, environ=environ)
        assert end.code == 1
        assert "line 1: notify_within: differs" in end.stderr

        for batch_id in ("b1", "b2", "ordered"):
            await daemon.settle(batch_id, [{"oss_object_name": "k", "target_url": None, "status": "FAILED"}])

        end = await run_command("reconcile", *arguments, "--json", cwd=tmp_path)
        found = {each["reference"]: each["result"] for each in map(json.loads, end.stdout.splitlines())}
        assert end.code == 1
        # The fourth is known by its reference alone, and was matched by order.
        assert found == {"r1": "incomplete", "r2": "short", "r3": "never_notified", "r4": "incomplete"}
        end = await run_command("reconcile", *arguments, "--csv", *address, cwd=tmp_path, environ=environ)
        assert end.stdout.splitlines()[2].startswith("short,3,r2,")
        end = await run_command("reconcile", *arguments, cwd=tmp_path)
        assert end.stdout.endswith("1 never notified, 1 short, 2 incomplete, 0 pending, 0 complete, 0 not submitted\n")
        (tmp_path / "gbk.csv").write_bytes("reference\n订单\n".encode("gbk"))
        end = await run_command("reconcile", "-f", "gbk.csv", cwd=tmp_path)
        assert (end.code, "is GBK" in end.stderr) == (1, True)
        end = await run_command("expect", "-f", "none.csv", *address, cwd=tmp_path, environ=environ)
        assert end.code == 2
