"""The table of pages and actions."""

from __future__ import annotations

from notify_server.web.dashboard import actions, pages
from notify_server.web.dashboard.dashboard import View

VIEWS = (
    View("GET", "/", pages.overview),
    View("GET", "/ui/batches", pages.batches),
    View("GET", "/ui/batches/{id:[0-9]{1,18}}", pages.batch),
    View("GET", "/ui/files", pages.files),
    View("GET", "/ui/files/{id:[0-9]{1,18}}", pages.file),
    View("GET", "/ui/failures", pages.failures),
    View("GET", "/ui/hosts", pages.hosts),
    View("GET", "/ui/rejections", pages.rejections),
    View("GET", "/ui/rejections/{id:[0-9]{1,18}}", pages.rejection),
    View("GET", "/ui/search", pages.search),
    View("GET", "/ui/recheck", actions.confirm_recheck),
    View("POST", "/ui/recheck", actions.recheck),
    View("POST", "/ui/rejections/{id:[0-9]{1,18}}/replay", actions.replay),
    View("GET", "/docs", pages.docs),
    View("GET", "/ui/login", actions.login_form, open=True),
    View("POST", "/ui/login", actions.login, open=True),
    View("POST", "/ui/logout", actions.logout),
    View("POST", "/ui/language", actions.language, open=True),
    View("GET", "/ui/static/{version}/{name:.+}", pages.static, open=True),
    View("GET", "/ui{path:(/.*)?}", pages.nothing),
)
