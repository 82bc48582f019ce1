"""Small runs of the torture's parts, so that what they show holds with every change, and they themselves keep working.

`make torture` runs them for minutes.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console

from tests.torture import crash, expect, forward, fsync, hang, nodes, soak, stop
from tests.torture.__main__ import PARTS, Part, arguments, load, report, run_part
from tests.torture.figures import Figure, Setting


def not_met(figures: Iterable[Figure]) -> list[Figure]:
    return [figure for figure in figures if not figure.met]


async def test_six_kills_under_load_lose_no_acked_batch_and_record_nothing_wrong(tmp_path: Path, seed: int) -> None:
    figures = await crash.run(Setting(seed, 0.03, tmp_path))
    assert not_met(figures) == []
    assert figures[0].counts["kills"] == 6
    assert figures[0].counts["acked"] > 25


async def test_three_stops_under_load_cut_off_no_request_and_burn_no_attempt(tmp_path: Path, seed: int) -> None:
    figures = await stop.run(Setting(seed, 0.06, tmp_path))
    assert not_met(figures) == []
    assert figures[0].counts["stops"] == 3


async def test_children_and_nodes_that_hang_under_load_are_replaced_and_lose_nothing(tmp_path: Path, seed: int) -> None:
    figures = await hang.run(Setting(seed, 0.1, tmp_path))
    # How fast it answers is a figure of `make torture`, where nothing else keeps the machine busy.
    assert [figure for figure in not_met(figures) if not figure.name.startswith(("slowest", "SIGTERM"))] == []
    exits = next(figure for figure in figures if figure.name.startswith("SIGTERM"))
    assert (exits.counts["exits"], exits.counts["left"]) == (3, 0)


async def test_one_of_two_nodes_that_is_killed_under_load_loses_nothing_and_the_other_records_its_files_once(
    tmp_path: Path, seed: int
) -> None:
    """Row 83."""
    figures = await nodes.run(Setting(seed, 0.05, tmp_path))
    assert not_met(figures) == []
    assert figures[0].counts["files"] == 10_000
    assert figures[3].counts["claimed"] > 0


async def test_daemon_killed_while_it_forwards_loses_no_verdict_and_sends_none_stale(tmp_path: Path, seed: int) -> None:
    figures = await forward.kills(Setting(seed, 0.005, tmp_path))
    # Whether a single kill finds deliveries that are not recorded is chance.
    assert not_met(figures[:3]) == []
    assert figures[0].counts["events"] > 0


async def test_submissions_never_notified_or_short_raise_one_event_in_spite_of_an_outage(
    tmp_path: Path, seed: int
) -> None:
    figures = await expect.on_sqlite(Setting(seed, 0.04, tmp_path), 5.0, 6.0)
    # How soon after its limit is a figure of `make torture`.
    assert not_met(figures[:3]) == []
    assert figures[0].counts["never"] == 2


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
async def test_every_ack_is_sent_after_the_log_was_synced_with_its_notification(tmp_path: Path, seed: int) -> None:
    figures = await fsync.run(Setting(seed, 0.02, tmp_path))
    assert not_met(figures) == []
    assert figures[0].counts["proven"] == 200


def trace_lines(*order: str) -> list[str]:
    calls = {
        "ask": '7 read(20<socket:[5]>, "POST /notify HTTP/1.1\\r\\n\\r\\n{\\"batch_id\\": \\"torture-1\\"}", 640) = 60',
        "page": '8 pwrite64(9<notify.db-wal>, "\\0\\0torture-1\\0", 4096, 56) = 4096',
        "sync": "8 fdatasync(9<notify.db-wal>) = 0",
        "sync fails": "8 fdatasync(9<notify.db-wal>) = -1 EIO (Input/output error)",
        "sync begins": "8 fdatasync(9<notify.db-wal> <unfinished ...>",
        "sync ends": "8 <... fdatasync resumed>) = 0",
        "ack": '7 write(20<socket:[5]>, "HTTP/1.1 200 OK\\r\\n", 190) = 190',
    }
    return [calls[name] for name in order]


@pytest.mark.parametrize(
    ("order", "proven"),
    [
        (("ask", "page", "sync", "ack"), 1),
        (("ask", "page", "sync begins", "sync ends", "ack"), 1),
        (("ask", "page", "sync begins", "ack", "sync ends"), 0),
        (("ask", "page", "ack", "sync"), 0),
        (("ask", "sync", "page", "ack"), 0),
        (("ask", "sync begins", "page", "sync ends", "ack"), 0),
        (("ask", "page", "sync fails", "ack"), 0),
        (("ask", "sync", "ack"), 0),
    ],
)
def test_an_ack_is_proven_only_by_a_sync_between_its_page_and_itself(
    tmp_path: Path, order: tuple[str, ...], proven: int
) -> None:
    trace = tmp_path / "trace"
    trace.write_text("\n".join(trace_lines(*order)))
    proof = fsync.prove(fsync.read_trace(trace))
    assert (proof.acks, proof.proven) == (1, proven)


def test_a_line_is_fitted_with_an_error_that_covers_what_scatters() -> None:
    steady = soak.fit([(second, 1000 + 3.0 * second) for second in range(100)])
    assert steady.slope == pytest.approx(3)
    assert steady.error == pytest.approx(0, abs=1e-9)
    dice = random.Random(1)
    noisy = [soak.fit([(second, dice.gauss(0, 10)) for second in range(120)]) for _ in range(200)]
    beyond = sum(abs(line.slope) > 2 * line.error for line in noisy)
    # With ten degrees of freedom 7 % are.
    assert 4 <= beyond <= 28


# --- The table ---


MET = Figure("acked batches lost", "0", "0 of 12 [of 12]", met=True, counts={"acked": 12})
UNMET = Figure("attempts burned", "0", "3", met=False)
ABOUT: dict[str, str | int | float] = {"commit": "abc1234", "seed": 7, "scale": 1.0}


def shown(*parts: Part, path: Path | None = None) -> tuple[int, str]:
    out = io.StringIO()
    code = report(Console(file=out, width=120), parts, ABOUT, path)
    return code, out.getvalue()


def test_a_figure_that_is_not_met_is_shown_and_makes_the_exit_status_1(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    code, text = shown(Part("crash", 1.0, [MET]), Part("stop", 2.0, [MET, UNMET]), path=path)
    assert code == 1
    assert text.startswith("commit abc1234, seed 7, scale 1.0\n")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [
        ["crash", "acked batches lost", "0", "0 of 12 [of 12]", "yes"],
        ["stop", "acked batches lost", "0", "0 of 12 [of 12]", "yes"],
        ["", "attempts burned", "0", "3", "NO"],
    ]
    written = json.loads(path.read_text())
    assert (written["commit"], written["seed"]) == ("abc1234", 7)
    assert [part["name"] for part in written["parts"]] == ["crash", "stop"]
    assert written["parts"][0]["figures"][0]["counts"] == {"acked": 12}


def test_figures_that_are_all_met_make_the_exit_status_0_and_no_figure_at_all_does_not() -> None:
    assert shown(Part("crash", 1.0, [MET]), Part("stop", 1.0, [MET]))[0] == 0
    assert shown(Part("crash", 1.0, [MET]), Part("stop", 1.0, []))[0] == 1


async def test_a_part_that_raises_has_the_exceptions_text_as_its_figure_and_leaves_nothing_behind() -> None:
    folders: list[Path] = []

    async def fails(setting: Setting) -> list[Figure]:
        folders.append(setting.work)
        (setting.work / "notify.db").touch()
        raise ValueError("the origin is gone")

    part = await run_part("crash", fails, 1, 1.0)
    (figure,) = part.figures
    assert (figure.met, figure.seen) == (False, "ValueError: the origin is gone")
    assert [folder.exists() for folder in folders] == [False]


async def test_a_part_that_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.torture.__main__.LEAST_SECONDS", 0.05)

    async def hangs(setting: Setting) -> list[Figure]:
        await asyncio.Event().wait()
        return [MET]

    part = await run_part("crash", hangs, 1, 1e-9)
    (figure,) = part.figures
    assert (figure.met, figure.seen) == (False, "not within 0 s")


@pytest.mark.parametrize("name", PARTS)
def test_every_part_says_in_one_line_what_it_does_and_can_be_run(name: str) -> None:
    run = load(name)
    first = (__import__(PARTS[name], fromlist=["run"]).__doc__ or "").splitlines()[0]
    assert first.endswith(".")
    assert asyncio.iscoroutinefunction(run)


@pytest.mark.parametrize("given", [["crush"], ["--scale", "0"], ["--scale", "nan"], ["crash", "--seed", "x"]])
def test_what_cannot_be_run_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(given)
    assert ended.value.code == 2
    assert "make torture: error: " in capsys.readouterr().err
