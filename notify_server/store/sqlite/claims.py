"""The claimed files, and those read ahead for later claims. In memory only: after a crash all of them are pending and
free.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from notify_server.model import DueFile

# Read-ahead: fetch up to this many due files per claim even if fewer are claimed, so that small claims do not read the
# held rows again and again. The second limit is for all hosts together.
READ_AHEAD = 512
MAX_AHEAD = 4096

# A due file and when it is due.
Due = tuple[int, DueFile]
# Where a read begins, behind a due time and an id; every file of a host comes after BEGINNING.
Position = tuple[int, int]
BEGINNING: Position = (-1, -1)
# Reads due files of a host behind a position, the longest due first: at most the given number, held ones included.
Read = Callable[[str, Position, int], Sequence[Due]]


class _Ahead:
    """Due files of a host that were read and not claimed yet."""

    __slots__ = ("files", "has_more", "last")

    def __init__(self) -> None:
        self.files: deque[Due] = deque()
        self.last = BEGINNING
        self.has_more = True


class Claims:
    """Knows which files are held, by host, and hands out free files."""

    def __init__(self) -> None:
        self._held: dict[int, str] = {}
        self._held_of: Counter[str] = Counter()
        # Held files that have been reset since they were claimed: their results are out of date.
        self._reset: set[int] = set()
        self._ahead: dict[str, _Ahead] = {}

    def holds(self, file: int) -> bool:
        """Return True if a result of the file may be recorded: it is held, and was not reset since."""
        return file in self._held and file not in self._reset

    def take(self, wanted: Iterable[tuple[str, int]], now: int, read: Read) -> list[DueFile]:
        """Claim up to n due files of each (host, n), the longest due first. A host that is named twice gets the sum.

        When `read` raises nothing is claimed.
        """
        sums: Counter[str] = Counter()
        for host, n in wanted:
            sums[host] += n
        if sum(1 + len(ahead.files) for ahead in self._ahead.values()) > MAX_AHEAD:
            self._ahead.clear()
        for host, n in sums.items():
            self._read_ahead(host, n, max(n, READ_AHEAD // len(sums)), read)
        # Marked as held only now: if a read failed, claims made before it would be lost.
        claimed: list[DueFile] = []
        for host, n in sums.items():
            ahead = self._ahead[host]
            while n and ahead.files and ahead.files[0][0] <= now:
                claimed.append(ahead.files.popleft()[1])
                n -= 1
            if not ahead.files and not ahead.has_more:
                del self._ahead[host]
        for file in claimed:
            self._held[file.id] = file.host
            self._held_of[file.host] += 1
        return claimed

    def release(self, files: Iterable[DueFile]) -> None:
        """End the claims of files that are still due."""
        self.end(files)
        # They have been due for longer than the files read after them.
        self._ahead.clear()

    def end(self, files: Iterable[DueFile]) -> None:
        """End the claims of files that were recorded."""
        for file in files:
            host = self._held.pop(file.id, None)
            if host is not None:
                self._held_of[host] -= 1
                if not self._held_of[host]:
                    del self._held_of[host]
            self._reset.discard(file.id)

    def reset(self, files: set[int]) -> None:
        """Note that these files were reset: what was read ahead of them is out of date."""
        self._reset.update(self._held.keys() & files)
        if files:
            self._ahead.clear()

    def _read_ahead(self, host: str, n: int, most: int, read: Read) -> None:
        """Have `n` due files of the host ahead, or all that there are; read `most` where there are fewer."""
        ahead = self._ahead.get(host)
        if ahead is not None:
            if ahead.has_more and len(ahead.files) < n:
                self._read_on(host, ahead, most, read)
            if len(ahead.files) >= n:
                return
        # From the beginning: files may have become due that sort before those read last. Held files are still pending
        # on disk, so read as many more and leave them out.
        ahead = self._ahead[host] = _Ahead()
        self._read_on(host, ahead, most + self._held_of[host] + len(self._reset), read)

    def _read_on(self, host: str, ahead: _Ahead, most: int, read: Read) -> None:
        rows = read(host, ahead.last, most)
        ahead.files.extend(row for row in rows if row[1].id not in self._held)
        ahead.has_more = len(rows) == most
        if rows:
            due, file = rows[-1]
            ahead.last = due, file.id
