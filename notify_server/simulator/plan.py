"""Plans a simulation: batches, their files, and how each file's object behaves. All of it depends on the seed alone."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from enum import StrEnum
from random import Random
from types import MappingProxyType

import msgspec

from notify_server.model import FileState, ReportedStatus
from notify_server.simulator.answers import RecordedAnswer

API_CODE = "rent.dcentralize.room.add"
CONTENT_TYPE = "image/jpeg"
# Objects are smaller than this, in bytes; a full GET receives at most this much.
LARGEST = 1 << 20
_APP_ID = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SOURCE_NAME = "0123456789abcdefghijklmnopqrstuv"


class Kind(StrEnum):
    """The behaviour of a planted file, in the order of display."""

    PRESENT = "present"
    SLOW = "slow"
    REFUSES_HEAD = "refuses HEAD"
    FAILS_FIRST = "fails at first"
    MISSING = "missing"
    FAILED = "reported FAILED"
    RECORDED = "recorded response"


EXPECTED: Mapping[Kind, FileState] = MappingProxyType(
    dict.fromkeys((Kind.PRESENT, Kind.SLOW, Kind.REFUSES_HEAD, Kind.FAILS_FIRST), FileState.AVAILABLE)
    | {Kind.MISSING: FileState.UNAVAILABLE, Kind.FAILED: FileState.UPLOAD_FAILED}
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A plan. `shares` are of all files, from 0 to 1, the rest is present; `redelivered` is a share of the batches.
    With `answers` there is one batch more, whose objects answer as recorded. Raises ValueError, one line naming the
    share, when they are impossible.
    """

    seed: int
    batches: int = 20
    files: int = 50
    shares: Mapping[Kind, float] = MappingProxyType({})
    redelivered: float = 0.0
    answers: tuple[RecordedAnswer, ...] = ()

    def __post_init__(self) -> None:
        for name, share in [*self.shares.items(), ("redelivered", self.redelivered)]:
            if not 0 <= share <= 1:
                raise ValueError(f"the share of {name} must be from 0 to 1, not {share:g}")
        # Ten times 0.1 is a little more than 1 in binary.
        if (total := sum(self.shares.values())) > 1 + 1e-9:
            named = " + ".join(f"{name} {share:g}" for name, share in self.shares.items() if share)
            raise ValueError(f"the shares of files come to {total:g}, more than 1: {named}")


class PlantedFile(msgspec.Struct, frozen=True, gc=False):
    """A file and its object. `size` is in bytes; `status` is the object's answer if not 200, and `failures` the number
    of requests that get it before the object is there; `answer` is how a recorded object answers.
    """

    key: str
    kind: Kind
    size: int = 0
    status: int = 0
    failures: int = 0
    answer: RecordedAnswer | None = None

    @property
    def expected(self) -> FileState:
        """Return the state that it should end in."""
        return EXPECTED[self.kind] if self.answer is None else self.answer.expect.state

    @property
    def path(self) -> str:
        """Return the path and query of its address."""
        return f"{self.key}?{self.answer.query}" if self.answer is not None and self.answer.query else self.key


class PlantedBatch(msgspec.Struct, frozen=True):
    """A batch to be notified; `files` by key."""

    batch_id: str
    api_code: str
    files: Mapping[str, PlantedFile]

    def body(self, objects: str) -> bytes:
        """Return the notification as the platform posts it. `objects` is the object store's address, ending in a
        slash.
        """
        entries = [
            # Every other FAILED file has no address: the platform's document does not require one.
            {"status": ReportedStatus.FAILED, "oss_object_name": file.key, "target_url": ""}
            if file.kind is Kind.FAILED and file.size % 2
            else {
                "status": ReportedStatus.FAILED if file.kind is Kind.FAILED else ReportedStatus.FINISHED,
                "oss_object_name": file.key,
                "target_url": objects + file.path,
            }
            for file in self.files.values()
        ]
        return msgspec.json.encode({"batch_id": self.batch_id, "api_code": self.api_code, "file_list": entries})

    def count(self, state: FileState) -> int:
        """Return the number of its files that should end in this state."""
        return sum(file.expected is state for file in self.files.values())


def plant_batches(plan: Plan, random: Random) -> Iterator[PlantedBatch]:
    app_id = "".join(random.choices(_APP_ID, k=16))
    kinds = _kinds(plan, plan.batches * plan.files)
    random.shuffle(kinds)
    # 13 digits of milliseconds and 4 more, as in the published example; the seed decides them too.
    moment = random.randrange(10**16, 4 * 10**16)
    for start in range(0, len(kinds), plan.files):
        moment += random.randrange(1, 10**6)
        batch_id = f"{random.getrandbits(128):032x}.{random.randrange(1, 200)}.{moment}"
        files = [_file(kind, _key(app_id, random), random) for kind in kinds[start : start + plan.files]]
        yield PlantedBatch(batch_id, API_CODE, {file.key: file for file in files})
    if plan.answers:
        batch_id = f"{random.getrandbits(128):032x}.{random.randrange(1, 200)}.{moment + 1}"
        # Its keys are of this run alone, because an object store serves one object for a key.
        first = random.randrange(2**31 - len(plan.answers))
        recorded = [
            PlantedFile(answer.key(number), Kind.RECORDED, answer=answer)
            for number, answer in enumerate(plan.answers, first)
        ]
        yield PlantedBatch(batch_id, API_CODE, {file.key: file for file in recorded})


def _kinds(plan: Plan, total: int) -> list[Kind]:
    """Return kinds in exactly these shares, to within rounding: chance alone would leave small runs without the rare
    kinds.
    """
    kinds: list[Kind] = []
    reached = 0.0
    for kind in Kind:
        reached += plan.shares.get(kind, 0.0)
        kinds += [kind] * (min(round(reached * total), total) - len(kinds))
    return kinds + [Kind.PRESENT] * (total - len(kinds))


def _key(app_id: str, random: Random) -> str:
    # The name is the first 24 bytes of the source file's path.
    path = f"/apt_common/o_{''.join(random.choices(_SOURCE_NAME, k=10))}"
    return f"{app_id}/IMAGE/{random.randrange(-(2**31), 2**31)}/{base64.b64encode(path.encode()).decode()}"


def _file(kind: Kind, key: str, random: Random) -> PlantedFile:
    size = random.randrange(1, LARGEST)
    match kind:
        case Kind.REFUSES_HEAD:
            return PlantedFile(key, kind, size, random.choice((405, 403)))
        case Kind.FAILS_FIRST:
            return PlantedFile(key, kind, size, random.choice((500, 503)), random.choice((1, 2)))
        case Kind.MISSING:
            return PlantedFile(key, kind, size, 404)
        case _:
            return PlantedFile(key, kind, size)
