"""The commands that change the record: recheck, replay, prune."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from notify_server.cli.common import EXIT_FAILED, VERBOSE, UsageError, counted, printable
from notify_server.cli.listing import T, find_batch, find_file, local, moment, print_json
from notify_server.cli.source import Acting, Source, SourceError, acting
from notify_server.config import Config
from notify_server.model import FileState
from notify_server.operations import NOT_AVAILABLE, ActionRefusedError, Prune, Recheck


async def confirm(question: str, *, yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("not a terminal: add --yes to confirm")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    # A blocking read would delay Ctrl-C; once a terminal is readable it has a whole line.
    loop, typed = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, typed.set)
    try:
        await typed.wait()
    finally:
        loop.remove_reader(sys.stdin)
    return sys.stdin.readline().strip().lower() in ("y", "yes", "是")


@contextlib.asynccontextmanager
async def _by(config: Config, source: Source) -> AsyncIterator[Acting]:
    async with acting(config, source) as actor:
        itself = "the database" if source.itself is not None else "the file"
        by = f"the server at {source.daemon.url}" if source.daemon is not None else f"this command, on {itself} itself"
        if VERBOSE.get():
            print(f"acting through {by}", file=sys.stderr)
        yield actor


async def _refusable(work: Awaitable[T]) -> T:
    try:
        return await work
    except ActionRefusedError as error:
        raise SourceError(str(error)) from error


class RecheckSelection(NamedTuple):
    """The files to check again, as the options name them."""

    file: str | None
    batch_id: str | None
    api_code: str | None
    reason: str | None
    host: str | None
    states: Sequence[FileState] | None
    dry_run: bool


async def recheck(config: Config, source: Source, chosen: RecheckSelection, *, yes: bool, as_json: bool) -> int:
    """Check files again, after confirming their number."""
    if chosen.file is None and chosen.batch_id is None and chosen.reason is None:
        raise UsageError("name files with --file, --batch or --reason")
    batch = None if chosen.batch_id is None else (await find_batch(source, chosen.batch_id, chosen.api_code)).id
    states = list(chosen.states or NOT_AVAILABLE)
    file = None if chosen.file is None else await find_file(source, chosen.file, batch)
    if file is not None:
        batch = None
    wanted = Recheck(file, batch, chosen.reason, chosen.host, states=states, dry_run=chosen.dry_run)
    async with _by(config, source) as actor:
        dry = await _refusable(actor.recheck(msgspec.structs.replace(wanted, dry_run=True)))
        if dry is None:
            raise SourceError("there is no such file or batch: `notify-server batches` lists them")
        if wanted.dry_run or not dry.files:
            if as_json:
                print_json(dry)
            elif not dry.files:
                print(await _nothing(source, batch))
            else:
                print(f"{counted(dry.files, 'file')} would be rechecked (dry run)")
            return 0
        if not await confirm(f"Recheck {counted(dry.files, 'file')}?", yes=yes):
            return EXIT_FAILED
        files = 0
        while True:
            done = await _refusable(actor.recheck(wanted))
            files += done.files if done is not None else 0
            if done is None or not done.more:
                break
        if as_json:
            print_json({"files": files})
        else:
            later = "" if source.served else f": the server checks {'it' if files == 1 else 'them'} when it runs"
            print(f"{counted(files, 'file')} queued for recheck{later}")
    return 0


async def _nothing(source: Source, batch: int | None) -> str:
    """Return why no file would be rechecked."""
    found = await source.records.batch(batch) if batch is not None else None
    if found is None or not found.upload_failed:
        return "Nothing to recheck: no file matches."
    failed = f"{counted(found.upload_failed, 'file')} reported FAILED by the platform"
    return f"Nothing to recheck: {failed}; have it deliver them again."


async def replay(config: Config, source: Source, ids: Sequence[int], *, dry_run: bool, as_json: bool) -> int:
    """Process rejected notifications again. Returns 1 when one is rejected again or does not exist."""
    if dry_run:
        return await _look_at_rejections(source, ids, as_json=as_json)
    code = 0
    async with _by(config, source) as actor:
        for id in ids:
            try:
                taken = await actor.replay(id)
                problem = "" if taken is not None else "there is none; it may have been processed"
            except (ActionRefusedError, SourceError) as error:
                taken, problem = None, str(error)
            if taken is None:
                code = EXIT_FAILED
            if as_json:
                print_json({"rejection": id, "delivery": taken.delivery if taken else None, "problem": problem or None})
            elif taken is not None:
                print(f"rejection {id}: accepted as delivery {taken.delivery}, request_id {taken.request_id}")
            else:
                print(f"rejection {id}: {problem}", file=sys.stderr)
    return code


async def _look_at_rejections(source: Source, ids: Sequence[int], *, as_json: bool) -> int:
    code = 0
    for id in ids:
        rejection = await source.records.rejection(id)
        if rejection is None:
            code = EXIT_FAILED
        if as_json:
            print_json({"rejection": id, "detail": rejection.detail if rejection else None})
        elif rejection is not None:
            print(f"rejection {id}: would be processed again; it was rejected because: {printable(rejection.detail)}")
        else:
            print(f"rejection {id}: there is none", file=sys.stderr)
    return code


async def prune(
    config: Config,
    source: Source,
    completed: str | None,
    refused: str | None,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Delete old data, after counting it and confirming the numbers."""
    wanted = Prune(None if completed is None else moment(completed), None if refused is None else moment(refused))
    now = datetime.now(UTC)
    if wanted.completed_before is None and wanted.rejections_before is None and source.daemon is not source.records:
        wanted = Prune(
            now - timedelta(seconds=config.retention.completed), now - timedelta(seconds=config.retention.rejections)
        )
    what = [
        f"{name} before {local(before)}"
        for name, before in (
            ("batches completed", wanted.completed_before), ("rejections received", wanted.rejections_before)
        )
        if before is not None
    ] or ["everything older than the server's [retention]"]  # fmt: skip
    async with _by(config, source) as actor:
        found = await actor.prune(msgspec.structs.replace(wanted, dry_run=True))
        of_files = counted(found.files or 0, "file")
        numbers = f"{found.batches or 0:,} batches ({of_files}) and {counted(found.rejections or 0, 'rejection')}"
        if dry_run:
            shown = {"batches": found.batches, "files": found.files, "rejections": found.rejections}
            print_json(shown) if as_json else print(f"{numbers} would be deleted: {' and '.join(what)}")
            return 0
        if not await confirm(f"Delete {numbers}: {' and '.join(what)}?", yes=yes):
            return EXIT_FAILED
        rows = 0
        while True:
            done = await actor.prune(wanted)
            rows += done.rows
            if not done.more:
                break
    print_json({"rows": rows}) if as_json else print(f"{rows:,} rows deleted")
    return 0
