"""The table of pages and actions."""

from __future__ import annotations

from notify_server.web.dashboard import actions, deliveries, expected, finding, journal, pages
from notify_server.web.dashboard.dashboard import View

_ENDPOINT = "/ui/deliveries/{name:[A-Za-z0-9_-]{1,64}}"

VIEWS = (
    View("GET", "/", pages.overview),
    View("GET", "/ui/batches", pages.batches),
    View("GET", "/ui/batches/{id:[0-9]{1,18}}", pages.batch),
    View("GET", "/ui/batches/{id:[0-9]{1,18}}/notifications", finding.notifications),
    View("GET", "/ui/files", finding.files),
    View("GET", "/ui/files/{id:[0-9]{1,18}}", pages.file),
    View("GET", "/ui/failures", finding.failures),
    View("GET", "/ui/hosts", pages.hosts),
    View("GET", "/ui/expected", expected.expected),
    View("GET", "/ui/expected/{id:[0-9]{1,18}}/delete", expected.confirm_delete),
    View("POST", "/ui/expected/{id:[0-9]{1,18}}/delete", expected.delete),
    View("GET", "/ui/rejections", pages.rejections),
    View("GET", "/ui/rejections/{id:[0-9]{1,18}}", pages.rejection),
    View("GET", "/ui/search", finding.search),
    View("GET", "/ui/recheck", actions.confirm_recheck),
    View("POST", "/ui/recheck", actions.recheck),
    View("POST", "/ui/rejections/{id:[0-9]{1,18}}/replay", actions.replay),
    View("GET", "/ui/deliveries", deliveries.endpoints),
    View("GET", "/ui/delivery/{id:[0-9]{1,18}}", deliveries.delivery),
    View("GET", _ENDPOINT, deliveries.endpoint),
    View("POST", f"{_ENDPOINT}/test", deliveries.test),
    View("GET", f"{_ENDPOINT}/replay", deliveries.confirm_replay),
    View("POST", f"{_ENDPOINT}/replay", deliveries.replay),
    View("POST", f"{_ENDPOINT}/stop", deliveries.stop),
    View("POST", f"{_ENDPOINT}/start", deliveries.start),
    View("GET", "/ui/acknowledge", journal.confirm_acknowledge),
    View("POST", "/ui/acknowledge", journal.acknowledge),
    View("GET", "/ui/actions", journal.actions),
    View("GET", "/docs", pages.docs),
    View("GET", "/ui/login", actions.login_form, open=True),
    View("POST", "/ui/login", actions.login, open=True),
    View("GET", "/ui/login/{code:[A-Za-z0-9_-]{1,100}}", actions.log_in_once, open=True),
    View("POST", "/ui/logout", actions.logout),
    View("POST", "/ui/language", actions.language, open=True),
    View("GET", "/ui/static/{version}/{name:.+}", pages.static, open=True),
    View("GET", "/ui{path:(/.*)?}", pages.nothing),
)
