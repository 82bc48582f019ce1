"""Finds out under which URL a browser reaches the dashboard, which a proxy may serve under a sub-path."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web

from notify_server.callbacks.access import within
from notify_server.config import ServerConfig

_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")
# Attributes whose values are paths of this site. Text of strangers cannot look like one: its quotes are escaped.
_PATH = re.compile(r'((?:href|action|src|hx-get|hx-post)=")(?=/(?!/))')


class PublicUrl:
    """`[server] public_url` if it is set, otherwise as in the request and a trusted proxy's headers.

    The proxy strips the prefix from the paths that it forwards.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._base = config.public_url.rstrip("/") if config.public_url is not None else None
        self._prefix = urlsplit(self._base).path if self._base is not None else ""
        self._trusted = config.trusted_proxies

    def prefix(self, request: web.Request) -> str:
        """Return the path that all paths of this site begin with, without a slash at its end."""
        if self._base is not None:
            return self._prefix
        prefix = self._forwarded(request, "X-Forwarded-Prefix").rstrip("/")
        return prefix if _PREFIX.fullmatch(prefix) and not {".", ".."} & set(prefix.split("/")) else ""

    def base(self, request: web.Request) -> str:
        """Return the URL of the overview, without a slash at its end."""
        if self._base is not None:
            return self._base
        scheme = "https" if self._forwarded(request, "X-Forwarded-Proto").lower() == "https" else request.scheme
        return f"{scheme}://{request.host}{self.prefix(request)}"

    def _forwarded(self, request: web.Request, header: str) -> str:
        value = request.headers.get(header, "").strip()
        return value if value and within(request.remote or "", self._trusted) else ""


def is_loopback(host: str) -> bool:
    """Return True for a loopback address or a name of this machine."""
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def with_prefix(html: str, prefix: str) -> str:
    """Put the prefix before every path of this site in a page."""
    return _PATH.sub(rf"\g<1>{prefix}", html) if prefix else html
