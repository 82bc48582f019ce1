"""The claims of this node: leases in the database, and the due files that they are for in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from notify_server.model import DueFile, FileResult
from notify_server.store.base import MAX_ID
from notify_server.store.postgres.node import Node
from notify_server.store.postgres.session import CLAIMING, Connection, Session, patience, retry_once
from notify_server.store.sql import load_queries

SQL = load_queries("postgres")

# Sorts before every file that is due.
_BEGINNING = (-MAX_ID, 0)


class Positions:
    """Remembers for each host up to which file, by due time and id, this node has claimed.

    The next claim seeks from there, so that it does not read the files again that are claimed already. Files before the
    position can become free (released, or of a node that died), so positions are dropped each second, and for a host
    that has fewer files behind its position than a claim wants.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}

    def after(self, host: str) -> tuple[int, int]:
        """Return the due time and the id behind which files of the host are sought."""
        return self._last.get(host, _BEGINNING)

    def advance(self, wanted: Mapping[str, int], found: Sequence[tuple[int, DueFile]]) -> None:
        """Move on to the last file found of each host that gave as many as wanted. `found` is in the order of each
        host, with the due times.
        """
        got = Counter(file.host for _, file in found)
        ends = {file.host: (at, file.id) for at, file in found}
        self._last.update((host, end) for host, end in ends.items() if got[host] == wanted[host])

    def restart_short(self, wanted: Mapping[str, int], found: Sequence[tuple[int, DueFile]]) -> dict[str, int]:
        """Restart the hosts that gave fewer files than wanted from behind a position; return how many they lack."""
        got = Counter(file.host for _, file in found)
        short = {host: n - got[host] for host, n in wanted.items() if got[host] < n and host in self._last}
        for host in short:
            del self._last[host]
        return short

    def clear(self) -> None:
        """Restart all hosts."""
        self._last.clear()


class Claims:
    """Claims due files under the id of `node` on a connection of its own, and gives claims back."""

    def __init__(self, url: str, place: str, lease: float, node: Node) -> None:
        self._session = Session(url, place, CLAIMING | patience(lease))
        self._node = node
        self._lock = asyncio.Lock()
        self._positions = Positions()
        self._held: dict[int, DueFile] = {}
        # Deleted from the database by the next claim, or by the next call of `return_released`.
        self._released: set[int] = set()
        # True while the database may have claims of this node that the node does not know: an answer was lost.
        self._uncertain = False

    async def close(self) -> None:
        await self._session.close()

    async def claim(self, wanted: Sequence[tuple[str, int]], now: int) -> list[DueFile]:
        """See base.FileQueue.claim. Returns nothing while this node is not alive."""
        # A host may be named twice: its numbers add up.
        sums: Counter[str] = Counter()
        for host, n in wanted:
            sums[host] += n
        async with self._lock, self._session.use() as connection:
            await self._give_back(connection)
            id = self._node.id
            found = await self._claim(connection, sums, now, id)
            if found is not None and (short := self._positions.restart_short(sums, found)):
                found += await self._claim(connection, short, now, id) or []
                found.sort(key=lambda each: each[0])
            if found is not None and self._node.is_now(id):
                files = [file for _, file in found]
                self._held.update((file.id, file) for file in files)
                return files
        self._node.check()
        return []

    async def _claim(
        self, connection: Connection, wanted: Mapping[str, int], now: int, node: int
    ) -> list[tuple[int, DueFile]] | None:
        """Return the files claimed, with the times at which they were due; None when this node is not alive."""
        after = [self._positions.after(host) for host in wanted]
        parameters = list(wanted), list(wanted.values()), [at for at, _ in after], [id for _, id in after], now, node
        self._uncertain = True
        rows = await retry_once(partial(connection.fetch, SQL["claim"], *parameters))
        self._uncertain = False
        if not rows[0]["alive"]:
            return None
        found = [(at, DueFile(*rest)) for _, at, *rest in rows if at is not None]
        self._positions.advance(wanted, found)
        return found

    def release(self, files: Iterable[DueFile]) -> None:
        """Give claims back soon."""
        released = {file.id for file in files if self._held.get(file.id) == file}
        for file in released:
            del self._held[file]
        self._released |= released

    async def return_released(self) -> None:
        """Delete released claims from the database even if no claim follows."""
        if self._released or self._uncertain:
            async with self._lock, self._session.use() as connection:
                await self._give_back(connection)

    async def _give_back(self, connection: Connection) -> None:
        if self._uncertain:
            await connection.execute(SQL["leases_unknown"], self._node.id, list(self._held))
            self._uncertain = False
            self._released.clear()
            self._positions.clear()
        if self._released:
            self._positions.clear()
            released = list(self._released)
            await connection.execute(SQL["release"], released, self._node.id)
            self._released.difference_update(released)

    def held(self, results: Sequence[FileResult]) -> list[FileResult]:
        """Return the results of files that this node holds as they were claimed."""
        return [result for result in results if self._held.get(result.file.id) == result.file]

    def end(self, results: Sequence[FileResult]) -> None:
        """Forget the claims whose results are recorded: that has ended them in the database."""
        for result in results:
            self._held.pop(result.file.id, None)

    def hold(self, file: DueFile) -> None:
        """Keep a claim in memory that the database has."""
        self._held[file.id] = file

    def forget_positions(self) -> None:
        """Seek the files of every host from the beginning again."""
        self._positions.clear()

    def forget_all(self) -> None:
        """Drop every claim: the lease of this node has run out."""
        self._held.clear()
        self._released.clear()
        self._positions.clear()
