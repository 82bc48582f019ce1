"""Lists of addresses in every form that people have them in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from notify_server.cli.addresses import BLOCK_BYTES, LINE_BYTES, AddressFile, Entry, InputError
from tests.support.notification import batch_body, failed, finished

A, B = "https://a.example/1?x=1,2", "http://b.example/二"


def entries(tmp_path: Path, content: str | bytes, name: str = "list.txt") -> list[Entry]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(AddressFile(str(path)).entries(lambda: None))


@pytest.mark.parametrize(
    "content",
    [
        f"{A}\n{B}\n",
        f"\ufeff# two of them\r\n\r\n  {A}  \r\n{B}",
        f'{{"target_url": "{A}"}}\n\n{{"id": 7, "url": "{B}"}}\n',
        json.dumps({"address": A}) + "\n" + batch_body("b", [B]).decode(),
        json.dumps(json.loads(batch_body("b", [A, B])), indent=2),
        json.dumps({"appId": "1", "nonce": "n", "params": json.loads(batch_body("b", [A, B])), "apiCode": "c",
                    "timestamp": 1753000000000, "sign": "s"}),
    ],
    ids=["lines", "comments and blanks", "objects", "objects and notifications", "a notification", "an envelope"],
)  # fmt: skip
def test_text_and_json_hold_their_addresses(tmp_path: Path, content: str) -> None:
    assert entries(tmp_path, content) == [Entry(A), Entry(B)]


@pytest.mark.parametrize("name", ["list.csv", "list"])
@pytest.mark.parametrize(
    "content",
    [
        f'id,target_url,url\r\n1,"{A}",x\r\n2,{B},y\r\n3,,z\r\n',
        f"\ufeffURL;size\n{A};1\n{B};2\n",
        f"key\taddress\nk\t{A}\nk\t{B}\n",
        f'k1,"{A}"\nk2,{B}\n',
    ],
    ids=["target_url before url", "semicolons", "tabs", "no header"],
)
def test_csv_is_recognised_by_its_suffix_or_its_first_line(tmp_path: Path, content: str, name: str) -> None:
    assert entries(tmp_path, content, name) == [Entry(A), Entry(B)]


@pytest.mark.parametrize("content", [f'"{A}"\n{B}\n', f'object,where\nk,"{A}"\nk,{B}\n', f'where\n"{A}"\n{B}\n'])
def test_a_csv_file_needs_no_known_header(tmp_path: Path, content: str) -> None:
    assert entries(tmp_path, content, "list.csv") == [Entry(A), Entry(B)]


def test_a_file_that_the_platform_reported_as_failed_is_listed_as_such(tmp_path: Path) -> None:
    body = batch_body("b", [failed("k1"), failed("k2", B), finished(A)])
    assert entries(tmp_path, body) == [Entry("", failed=True), Entry(B, failed=True), Entry(A)]


@pytest.mark.parametrize("content", ["", "\n\n# nothing\n"])
def test_an_empty_list_has_no_addresses(tmp_path: Path, content: str) -> None:
    assert entries(tmp_path, content) == []


def test_lines_are_whole_wherever_a_read_ends(tmp_path: Path) -> None:
    urls = [f"http://a.example/{number:x<{number}}" for number in range(700)]
    content = "\n".join(urls)
    assert len(content) > 3 * BLOCK_BYTES
    assert [entry.url for entry in entries(tmp_path, content)] == urls


def test_every_read_is_announced_so_that_known_addresses_do_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text(f"{A}\n" * 10)
    file, seen = AddressFile(str(path)), list[Entry]()
    at_reads: list[int] = []
    for entry in file.entries(lambda: at_reads.append(len(seen))):
        seen.append(entry)
    assert at_reads == [0, 10]
    assert file.bytes_read == file.size == path.stat().st_size


def test_a_line_that_is_not_utf_8_stays_one_address(tmp_path: Path) -> None:
    assert entries(tmp_path, b"http://a.example/\xff\n" + A.encode()) == [Entry("http://a.example/\udcff"), Entry(A)]


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        ("id,name\n1,x\n", "list.csv", "line 2: no column has an address: call it target_url"),
        ("id,name\n", "list.csv", "line 1: no column has an address: call it target_url"),
        (f'["{A}"]\n', "list", 'line 1: must be an object a line, like {"target_url": "…"}'),
        (f'{{"url": "{A}"}}\n7\n', "list", 'line 2: must be an object a line, like {"target_url": "…"}'),
        (f'{{"url": "{A}"}}\n{{"batch_id": 7}}\n', "list", "line 2: batch_id: must be a string, not a number"),
        ('{"url": \n\n', "list", "line 2: Input data was truncated"),
        ("x" * (LINE_BYTES + BLOCK_BYTES), "list", f"line 1: is longer than {LINE_BYTES:,} bytes"),
        ("{" + ("x" * BLOCK_BYTES + "\n") * (LINE_BYTES // BLOCK_BYTES), "list", "write one object a line"),
        ('{"a":' * 100_000, "list", "line 1: "),
        (f'url\n"{A}' + "x" * 200_000, "list.csv", "line 2: field larger than field limit"),
    ],
)
def test_an_unreadable_line_is_reported_by_its_number(tmp_path: Path, content: str, name: str, problem: str) -> None:
    with pytest.raises(InputError) as error:
        entries(tmp_path, content, name)
    assert str(error.value).startswith(f"{tmp_path / name}, line ")
    assert problem in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "why"), [("missing", "No such file"), (".", "Is a directory"), ("\0", "null")])
def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        AddressFile(f"{tmp_path}/{name}")
