"""The command that writes the dispute bundle of a batch."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from notify_server.cli.common import UsageError, printable
from notify_server.cli.listing import find_batch
from notify_server.cli.source import Remote, Source, SourceError
from notify_server.store.bundle import write_bundle
from notify_server.store.reading.types import Records


async def bundle(source: Source, batch_id: str, api_code: str | None, target: Path, *, with_secrets: bool) -> int:
    """Write the bundle to `target`, readable for its owner only; nothing is left of one that could not be finished."""
    found = await find_batch(source, batch_id, api_code)
    unfinished = target.with_name(f"{target.name}.part")
    try:
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            if isinstance(source.records, Remote):
                async with contextlib.aclosing(source.records.bundle(found.id, with_secrets=with_secrets)) as pieces:
                    async for piece in pieces:
                        file.write(piece)
            else:
                batch = await source.records.batch(found.id)
                if batch is None:
                    raise SourceError(f'batch "{batch_id}" has just been deleted')
                records = cast("Records", source.records)
                await write_bundle(records, batch, file, datetime.now(UTC), with_secrets=with_secrets)
            size = file.tell()
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    name = printable(str(target))
    print(f"{name}: {size:,} bytes, {found.files:,} files. To check it, unzip it and run sha256sum -c SHA256SUMS")
    return 0
