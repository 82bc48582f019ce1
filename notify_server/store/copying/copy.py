"""Copies a record from one engine to the other and verifies the copy, while no server has either open.

Rows are copied in the order of their keys, a chunk in a transaction, so the highest key of the copy is where an
interrupted copy continues. The copy has a table `copying` until it is verified: no server starts on a record that has
it (`store.sql.unfinished`).

Both sides are read back to the end and compared: for every table the number of rows, and the sum (modulo 2**128) of a
BLAKE2b hash of each row. The hash is of the row's values as MessagePack, in the order of the columns of the table on
SQLite: integers as integers, floats as their 8 bytes, text as UTF-8, bytes unchanged, each with its kind and length.
The engines differ in how they print numbers and sort texts, so neither does.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, TypeAlias

import msgspec

from notify_server.errors import StoreRefusedError

Row: TypeAlias = tuple[Any, ...]
Key: TypeAlias = int | str

# Referenced tables come first. `heartbeat`, `node` and `lease` describe running servers, `secret` is
# the installation's own: they are not copied.
TABLES = (
    "notification", "batch", "file", "attempt", "rejection", "nonce", "event", "forward", "forward_attempt", "endpoint",
    "expectation", "ready_clock", "arrival", "quiet_clock", "action", "acknowledgement", "history",
)  # fmt: skip
# Tables whose ids are given out in sequence, and never twice.
COUNTED = (
    "notification", "batch", "file", "attempt", "rejection", "event", "forward", "forward_attempt", "expectation",
    "action", "acknowledgement", "history",
)  # fmt: skip
_NAMED = {"nonce": "key", "endpoint": "name", "arrival": "api_code"}
# Keys before the first one.
FIRST: dict[str, Key] = {"id": -(2**63), "key": "", "name": "", "api_code": ""}
# The most in memory, and in a transaction: rows, and bytes of their bodies.
CHUNK_ROWS = 5_000
CHUNK_BYTES = 8 * 1024 * 1024

Step: TypeAlias = Literal["copy", "verify"]
# Receives the step, the table, the rows done, and their total.
Progress: TypeAlias = Callable[[Step, str, int, int], object]


def key_of(table: str) -> str:
    """Return the column by which a table is ordered."""
    return _NAMED.get(table, "id")


class Side(ABC):
    """A record that servers cannot open as long as this is open. Statements raise StoreUnavailableError."""

    # How a statement refers to its n-th parameter; the bytes of a body; the errors that refuse a row.
    parameter: str
    body_bytes: str
    refusals: tuple[type[Exception], ...]

    def __init__(self, place: str) -> None:
        # Where it is, without secrets. The other side's table `copying` names its source by this.
        self.place = place

    @abstractmethod
    async def close(self) -> None:
        """Let servers open it again."""

    @abstractmethod
    async def _fetch(self, query: str, *parameters: object) -> list[Row]: ...

    @abstractmethod
    async def _execute(self, statement: str, *parameters: object) -> None: ...

    @abstractmethod
    async def _tables(self) -> set[str]: ...

    # To read

    @abstractmethod
    async def columns(self, table: str) -> list[str]:
        """Return the names of a table's columns."""

    async def count(self, table: str) -> int:
        """Return the number of a table's rows."""
        return int((await self._fetch(f"SELECT count(*) FROM {table}"))[0][0])  # noqa: S608

    async def chunks(self, table: str, columns: Sequence[str], after: Key) -> AsyncIterator[list[Row]]:
        """Yield the rows behind the key `after` in the order of their keys, some at a time."""
        key = key_of(table)
        place = columns.index(key)
        some = f"FROM {table} WHERE {key} > {self.parameter.format(1)} ORDER BY {key} LIMIT {self.parameter.format(2)}"
        numbers: list[int] = []
        while True:
            if "body" not in columns:
                numbers = [CHUNK_ROWS]
            elif not numbers:
                # The sizes first: SQLite and PostgreSQL would hand over any number of large bodies at once.
                sizes = await self._fetch(f"SELECT {self.body_bytes} {some}", after, CHUNK_ROWS)
                numbers = split([size for (size,) in sizes])
            rows = await self._fetch(f"SELECT {', '.join(columns)} {some}", after, numbers.pop(0) if numbers else 1)
            if not rows:
                return
            after = rows[-1][place]
            yield rows

    @abstractmethod
    async def counters(self) -> dict[str, int]:
        """Return the last id given out by each table of `COUNTED` that has given one out."""

    # To write

    async def copied_from(self) -> str | None:
        """Return the source of this unfinished copy, None if it is none."""
        return (await self._fetch("SELECT source FROM copying"))[0][0] if "copying" in await self._tables() else None

    async def filled(self) -> str | None:
        """Return the name of a table that has rows, None if all are empty."""
        present = await self._tables()
        for table in TABLES:
            if table in present and await self._fetch(f"SELECT 1 FROM {table} LIMIT 1"):  # noqa: S608
                return table
        return None

    async def begin(self, source: str, *, restart: bool) -> None:
        """Mark it as an unfinished copy of `source`; with `restart`, empty it."""
        async with self.transaction():
            if restart:
                await self._empty()
            await self._execute("CREATE TABLE IF NOT EXISTS copying (source TEXT NOT NULL)")
            await self._execute("DELETE FROM copying")
            await self._execute(f"INSERT INTO copying (source) VALUES ({self.parameter.format(1)})", source)  # noqa: S608

    @abstractmethod
    async def _empty(self) -> None: ...

    async def last(self, table: str) -> Key | None:
        """Return the highest key of a table, None if it is empty."""
        return (await self._fetch(f"SELECT max({key_of(table)}) FROM {table}"))[0][0]  # type: ignore[no-any-return] # noqa: S608

    @abstractmethod
    def transaction(self) -> AbstractAsyncContextManager[None]:
        """Commit everything appended inside, or nothing."""

    @abstractmethod
    def fit(self, columns: Sequence[str], rows: list[Row], replaced: Counter[str]) -> None:
        """Replace values that this engine cannot store, and count them by column in `replaced`."""

    async def append(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Add rows. Raises StoreRefusedError when the table refuses one of them."""
        try:
            await self._insert(table, columns, rows)
        except self.refusals as error:
            place = columns.index(key_of(table))
            raise StoreRefusedError(
                f"{self.place}: cannot have a row of {table} between {rows[0][place]} and {rows[-1][place]} ({error})"
            ) from error

    @abstractmethod
    async def _insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None: ...

    @abstractmethod
    async def finish(self, counters: dict[str, int]) -> None:
        """Reserve the ids that the source has given out, and unmark the copy: from now on it is an ordinary record."""


def split(sizes: Sequence[int]) -> list[int]:
    """Return how many rows with bodies of these sizes make up each chunk, one row at least."""
    numbers: list[int] = []
    rows = total = 0
    for size in sizes:
        rows, total = rows + 1, total + size
        if total > CHUNK_BYTES:
            numbers.append(rows)
            rows = total = 0
    return [*numbers, rows] if rows else numbers


class Digest:
    """Sums up a table in two numbers that do not depend on the order of its rows."""

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
        """The sum as 32 hexadecimal digits."""
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
        """Return whether the copy is identical."""
        return (self.rows, self.checksum) == (self.copy_rows, self.copy_checksum)


async def copy(
    source: Side, target: Side, *, restart: bool = False, progress: Progress = lambda *_: None
) -> list[Checked]:
    """Copy the missing rows, and verify all of them. Unless every table is identical the copy stays unfinished.

    With `restart` an unfinished copy is emptied first. Raises StoreRefusedError when `target` has rows and is no
    unfinished copy of `source`, StoreUnavailableError when one of them cannot be used any longer. The rows copied so
    far then stay, and the next call continues after them.
    """
    begun = await target.copied_from()
    if begun is None and (table := await target.filled()):
        raise StoreRefusedError(
            f"{target.place}: is not empty (there are rows in {table}): copy into a new file or an empty database"
        )
    if begun is None or restart:
        await target.begin(source.place, restart=begun is not None)
    elif begun != source.place:
        raise StoreRefusedError(
            f"{target.place}: is an unfinished copy of {begun}: continue with --from that, or start over with --restart"
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
        # Replacing characters of a key changes the order: these few rows are copied together.
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
            # A yield between two chunks, so that a stop takes effect even when nothing has to be waited for.
            await asyncio.sleep(0)
    progress("verify", table, total, total)
    return Checked(table, here.rows, here.checksum, there.rows, there.checksum, dict(replaced))
