"""A record is copied from one engine to the other, and verified, while no server has either.

Rows go over in the order of their keys, a chunk in a transaction, so what is there tells how far the copy has come, and
whoever was stopped goes on from there. A table `copying` is in the copy until it has been verified: no server starts on
one that has it (`base.UNFINISHED_COPY`).

Both are verified by what they hold, read back to the end from each: for every table the number of rows, and the sum
(modulo 2**128) of a BLAKE2b hash of each row. What is hashed is the row's values as MessagePack, in the order of the
columns of the table on SQLite: integers as integers, floats as their 8 bytes, text as UTF-8, bytes as they are, each
with its kind and length. Neither engine is asked to print a number or to sort a text, where they differ.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from notify_server.errors import StoreRefusedError

Row: TypeAlias = tuple[Any, ...]
Key: TypeAlias = int | str

# What is referred to comes first. `heartbeat`, `node` and `lease` are about servers that run.
TABLES = (
    "notification", "batch", "file", "attempt", "rejection", "nonce", "event", "forward", "forward_attempt", "endpoint",
)  # fmt: skip
# Those whose ids are given out one after the other, and none twice.
COUNTED = ("notification", "batch", "file", "attempt", "rejection", "event", "forward", "forward_attempt")
_NAMED = {"nonce": "key", "endpoint": "name"}
# Before the first of its kind.
FIRST: dict[str, Key] = {"id": -(2**63), "key": "", "name": ""}
# At most so much is in memory, and in a transaction: rows, and bytes of their bodies.
CHUNK_ROWS = 5_000
CHUNK_BYTES = 8 * 1024 * 1024

Step: TypeAlias = Literal["copy", "verify"]
# Told the step, the table, how many rows are done, and of how many.
Progress: TypeAlias = Callable[[Step, str, int, int], object]


def key_of(table: str) -> str:
    """The column that a table is copied in the order of."""
    return _NAMED.get(table, "id")


class Side(Protocol):
    """A record that no server has, and that none can get, as long as this is open."""

    @property
    def place(self) -> str:
        """Where it is, without secrets. In the other's table `copying` it tells what that is a copy of."""

    async def close(self) -> None:
        """Let servers have it again."""

    # To read

    async def columns(self, table: str) -> list[str]:
        """The names of a table's columns."""

    async def count(self, table: str) -> int:
        """How many rows a table has."""

    def chunks(self, table: str, columns: Sequence[str], after: Key) -> AsyncIterator[list[Row]]:
        """The rows behind the key `after`, in the order of their keys, some at a time."""

    async def counters(self) -> dict[str, int]:
        """The last id that was given out, of those of `COUNTED` where one was."""

    # To write

    async def copied_from(self) -> str | None:
        """What this is an unfinished copy of; None when it is none."""

    async def filled(self) -> str | None:
        """The name of a table that has rows; None when all are empty."""

    async def begin(self, source: str, *, anew: bool) -> None:
        """Make it an unfinished copy of `source`; with `anew` one that has no rows any more."""

    async def last(self, table: str) -> Key | None:
        """The highest key of a table, None when it is empty."""

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """What is appended inside is there in its whole, or not at all."""

    def fit(self, columns: Sequence[str], rows: list[Row], replaced: Counter[str]) -> None:
        """Make rows what this engine can hold of them; columns with a value that was not are counted in `replaced`."""

    async def append(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Add rows. Raises StoreRefusedError when one of them is none that the table can have."""

    async def finish(self, counters: dict[str, int]) -> None:
        """Give out no id again that has been given out before, and make it a record like any other."""


class Digest:
    """What a table holds, in two numbers that do not depend on the order of its rows."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum = 0

    def add(self, rows: Sequence[Row]) -> None:
        encode = msgspec.msgpack.Encoder().encode
        blake2b = hashlib.blake2b
        self.rows += len(rows)
        hashes = (blake2b(encode(row), digest_size=16).digest() for row in rows)
        self._sum += sum(int.from_bytes(each, "big") for each in hashes)

    @property
    def checksum(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._sum % 2**128:032x}"


class Checked(msgspec.Struct, frozen=True):
    """A table here and there. `replaced` counts, by column, the values of which the copy could not hold every character
    (NUL, on PostgreSQL) and has U+FFFD in its place; the checksums are of what it can hold."""

    table: str
    rows: int
    checksum: str
    copy_rows: int
    copy_checksum: str
    replaced: dict[str, int]

    @property
    def same(self) -> bool:
        """Whether the copy holds what it should."""
        return (self.rows, self.checksum) == (self.copy_rows, self.copy_checksum)


async def copy(
    source: Side, target: Side, *, restart: bool = False, progress: Progress = lambda *_: None
) -> list[Checked]:
    """Copy what is not there yet, and verify all of it. Unless every table is the same the copy stays unfinished.

    With `restart` an unfinished copy is emptied first. Raises StoreRefusedError when `target` has rows and is no
    unfinished copy of `source`, StoreUnavailableError when one of them cannot be used any longer; what has been copied
    then stays, and is gone on with.
    """
    begun = await target.copied_from()
    if begun is None and (table := await target.filled()):
        raise StoreRefusedError(
            f"{target.place}: is not empty (there are rows in {table}): copy into a new file or an empty database"
        )
    if begun is None or restart:
        await target.begin(source.place, anew=begun is not None)
    elif begun != source.place:
        raise StoreRefusedError(
            f"{target.place}: is an unfinished copy of {begun}: go on with --from that, or begin anew with --restart"
        )
    columns = {table: await source.columns(table) for table in TABLES}
    for table in TABLES:
        await _copy(source, target, table, columns[table], progress)
    checked = [await _check(source, target, table, columns[table], progress) for table in TABLES]
    if all(table.same for table in checked):
        await target.finish(await source.counters())
    return checked


async def _copy(source: Side, target: Side, table: str, columns: Sequence[str], progress: Progress) -> None:
    total, done, last = await source.count(table), await target.count(table), await target.last(table)
    progress("copy", table, done, total)
    if key_of(table) != "id":
        # What is replaced in a text changes its place in the order: these few go over together.
        if last is None:
            async with target.transaction():
                async for rows in source.chunks(table, columns, FIRST[key_of(table)]):
                    target.fit(columns, rows, Counter())
                    await target.append(table, columns, rows)
                    done += len(rows)
        progress("copy", table, done, total)
        return
    async for rows in source.chunks(table, columns, FIRST["id"] if last is None else last):
        target.fit(columns, rows, Counter())
        async with target.transaction():
            await target.append(table, columns, rows)
        done += len(rows)
        progress("copy", table, done, total)


async def _check(source: Side, target: Side, table: str, columns: Sequence[str], progress: Progress) -> Checked:
    here, there, replaced = Digest(), Digest(), Counter[str]()
    total = await source.count(table) + await target.count(table)
    for side, digest in ((source, here), (target, there)):
        async for rows in side.chunks(table, columns, FIRST[key_of(table)]):
            if side is source:
                target.fit(columns, rows, replaced)
            digest.add(rows)
            progress("verify", table, here.rows + there.rows, total)
            # Whoever stops it is heard between two chunks, also where nothing has to be waited for.
            await asyncio.sleep(0)
    progress("verify", table, total, total)
    return Checked(table, here.rows, here.checksum, there.rows, there.checksum, dict(replaced))
