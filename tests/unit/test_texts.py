"""What the dashboard says: both languages say all of it, and no template says anything of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from notify_server.action_log import ActionKind
from notify_server.config.forward import BOTS
from notify_server.events.payload import EventType
from notify_server.expect.expectation import ExpectationState, MatchedBy
from notify_server.model import CircuitState, FileState, Reason, Verdict
from notify_server.store.outbox import DeliveryState
from notify_server.web import rendering
from notify_server.web.api.endpoints import ENDPOINTS
from notify_server.web.language import LANGUAGES, Texts

WEB = Path(rendering.__file__).parent
TEMPLATES = sorted((WEB / "templates").glob("*.html"))
EN, ZH = LANGUAGES["en"], LANGUAGES["zh"]
# Texts chosen by a value: the beginning of their keys.
FAMILIES: dict[str, Sequence[str]] = {
    "state": list(FileState),
    "state_means": list(FileState),
    "verdict": list(Verdict),
    "circuit": list(CircuitState),
    "docs_of": [endpoint.id for endpoint in ENDPOINTS],
    "nav": ["overview", "batches", "expected", "failures", "hosts", "rejections", "deliveries", "actions",
            "docs"],
    "recheck": ["title", "nothing", "done", "more"],
    "acknowledge": ["title", "nothing", "done", "more"],
    "ending": ["object", "address"],
    "filter": ["period_1h", "period_24h", "period_7d", "period_30d"],
    "action": [kind.replace(".", "_") for kind in ActionKind],
    "channel": ["page", "api", "command"],
    "how": list(FileState),
    "flag": ["type_differs", "attachment", "octet_stream", "plain_http", "signed", "deleted_on"],
    "empty": ["loopback", "plain_http"],
    "error": ["not_found", "not_found_detail", "unavailable", "unavailable_detail", "refused", "logged_in",
              "logged_in_detail"],
    "login": ["wrong", "slow", "used"],
    "file": ["dns", "connect", "tls", "first_byte"],
    "overview": ["chart_requests", "chart_accepted", "chart_latency", "chart_backlog", "series_requests",
                 "series_failed", "series_accepted", "series_refused", "series_ack", "series_probe", "series_backlog",
                 "series_in_flight", "endpoint_failing", "endpoint_stopped"],
    "deliveries": ["stop", "start", "replayed"],
    "delivery_state": list(DeliveryState),
    "delivery_means": list(DeliveryState),
    "expected_state": list(ExpectationState),
    "expected_means": list(ExpectationState),
    "expected_by": list(MatchedBy),
    "endpoint_state": ["ok", "failing", "stopped"],
    "endpoint_kind": ["url", *BOTS, "command"],
    "event": [kind.replace(".", "_") for kind in EventType],
}  # fmt: skip
ATTRIBUTES = {"title", "alt", "placeholder", "aria-label", "aria-description", "data-label", "data-copied"}


def singular(key: str) -> bool:
    return key.endswith("_one")


def test_both_languages_say_the_same_things() -> None:
    # Chinese has no plural.
    assert {key for key in EN.by_key if not singular(key)} == {key for key in ZH.by_key if not singular(key)}


def test_both_languages_speak_of_the_same_values() -> None:
    def values(texts: Texts, key: str) -> set[str]:
        return set(re.findall(r"{(\w+)", texts.by_key[key]))

    assert [key for key in ZH.by_key if values(EN, key) != values(ZH, key)] == []


def test_the_chinese_is_chinese() -> None:
    latin = [key for key, text in ZH.by_key.items() if not re.search("[\u4e00-\u9fff]", text)]
    names = {"app.other_language", "batches.batch_id", "batches.api_code", "batch.request_id", "login.token"}
    names |= {
        "docs.title",
        "nav.docs",
        "file.url",
        "file.content_type",
        "file.etag",
        "file.last_modified",
        "file.dns",
        "file.tls",
        "file.phase",
    }
    assert set(latin) - names == set()


HAN = "\u3400-\u9fff"
HALF_WIDTH = re.compile(rf"[{HAN}][,:;?!()]|[,:;?!()][{HAN}]")


def test_chinese_texts_have_full_width_punctuation_beside_han_characters() -> None:
    assert {key: text for key, text in ZH.by_key.items() if HALF_WIDTH.search(text)} == {}


@pytest.mark.parametrize("text", ["文字,", "(中文", "中文:text", "text:中文", "真的?", "好!", "一;二"])
def test_half_width_punctuation_beside_a_han_character_is_found(text: str) -> None:
    assert HALF_WIDTH.search(text)


@pytest.mark.parametrize("text", ["文字，", "（中文）", "a, b (c): d", "设置 [auth] admin_token", "10:30 的批次"])
def test_other_punctuation_is_accepted(text: str) -> None:
    assert not HALF_WIDTH.search(text)


def said() -> set[str]:
    """The keys that templates and modules ask for."""
    sources = [
        path.read_text(encoding="utf-8")
        for path in [*TEMPLATES, *(WEB / "dashboard").glob("*.py"), WEB / "language.py"]
    ]
    keys = set(re.findall(r"""(?:\bt|self)\(["']([a-z0-9_.]+\.[a-z0-9_]+)["'][,)]""", "".join(sources)))
    return keys | {f"{family}.{word}" for family, words in FAMILIES.items() for word in words}


def test_the_vocabulary_has_every_key_in_use_and_no_other() -> None:
    there = {key for key in EN.by_key if not key.startswith("reason.") and not singular(key)}
    assert said() - there == set()
    assert there - said() == set()


@pytest.mark.parametrize("texts", LANGUAGES.values(), ids=LANGUAGES)
@pytest.mark.parametrize("part", ["what", "next"])
def test_every_reason_has_words_and_a_next_step(texts: Texts, part: str) -> None:
    told = {reason: texts.reason(reason, part) for reason in Reason}
    assert len(set(told.values())) == len(Reason)
    assert texts.reason("http_418", part) == texts("reason.http_4xx." + part)
    assert texts.reason("http_599", part) == texts("reason.http_5xx." + part)
    assert texts.reason("http_999", part) == texts("reason.http_other." + part)
    assert texts.reason(None, part, FileState.UPLOAD_FAILED) == texts("reason.upload_failed." + part)


@pytest.mark.parametrize("texts", LANGUAGES.values(), ids=LANGUAGES)
@pytest.mark.parametrize("part", ["why", "send"])
def test_every_reason_says_why_it_happens_and_what_to_send_to_the_platform(texts: Texts, part: str) -> None:
    families = {key.split(".")[1] for key in texts.by_key if key.startswith("reason.")}
    assert all(texts.by_key[f"reason.{family}.{part}"] for family in families)
    assert set(Reason) <= families


def test_a_number_chooses_between_singular_and_plural() -> None:
    assert [EN("count.files", n=n) for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]
    assert ZH("count.files", n=1) == "1 个文件"


def test_values_put_into_a_text_are_escaped() -> None:
    assert EN("search.found", q="<b>") == "Found for &lt;b&gt;"


class _Words(HTMLParser):
    """The words that a page would show as they stand in the template."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._code += tag == "code"
        self.found += [value for name, value in attrs if name in ATTRIBUTES and value is not None and _has_word(value)]

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag == "code"

    def handle_data(self, data: str) -> None:
        if not self._code and _has_word(data):
            self.found.append(data.strip())


def _has_word(text: str) -> bool:
    return bool(re.search(r"[^\W\d_]", text))


def words_of(template: str) -> list[str]:
    parser = _Words()
    parser.feed(re.sub(r"{#.*?#}|{%.*?%}|{{.*?}}", "", template, flags=re.DOTALL))
    return parser.found


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: str(path.name))
def test_no_template_has_words_of_its_own(path: Path) -> None:
    assert words_of(path.read_text(encoding="utf-8")) == []


def test_words_of_a_template_are_found() -> None:
    template = '<p title="hint {{ x }}">{{ t("a.b") }} and <code>GET</code>{# so #} 更多</p>'
    assert words_of(template) == ["hint ", "and", "更多"]
