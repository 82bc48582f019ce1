"""Sends one event to a receiver over HTTP or to a program, and judges the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from notify_server.config.forward import CommandEndpoint, UrlEndpoint
from notify_server.events.payload import rfc3339
from notify_server.forward import cloudevents
from notify_server.forward.client import EndpointClient
from notify_server.forward.outcome import Attempt
from notify_server.forward.script import Scripts
from notify_server.forward.standard_webhooks import Signer
from notify_server.store.outbox import Outgoing


class Transport(Protocol):
    """The way to one endpoint."""

    async def send(self, delivery: Outgoing) -> Attempt:
        """Send the event once. Never raises."""

    async def close(self) -> None:
        """Release its connections."""


class _Parts(msgspec.Struct):
    data: msgspec.Raw


class UrlTransport:
    """Signed requests (Standard Webhooks), as they are or in CloudEvents' binary mode."""

    def __init__(self, endpoint: UrlEndpoint, client: EndpointClient, now: Callable[[], int]) -> None:
        self._endpoint = endpoint
        self._client = client
        self._now = now
        self._signer = Signer([secret.get_secret_value() for secret in endpoint.secrets])
        self._url = endpoint.url.get_secret_value()

    async def send(self, delivery: Outgoing) -> Attempt:
        body = delivery.payload
        headers: dict[str, str] = {}
        if self._endpoint.format == "cloudevents":
            body = bytes(msgspec.json.decode(body, type=_Parts).data)
            headers = cloudevents.headers(
                key=delivery.key,
                endpoint=self._endpoint.name,
                type=delivery.type,
                time=rfc3339(delivery.occurred_at),
                subject=delivery.subject,
            )
        headers |= self._signer.headers(delivery.key, self._now(), body)
        answer = await self._client.post(self._url, body, headers)
        error = answer.error
        if answer.status is not None and not 200 <= answer.status < 300:
            error = f"answered HTTP {answer.status}"
        elif answer.status is not None and not self._endpoint.accept.matches(answer.body):
            error = f"answered HTTP {answer.status}, but its body does not match accept = {self._endpoint.accept}"
        return Attempt(answer.status, error, answer.text, answer.elapsed_ms, answer.retry_after_ms)

    async def close(self) -> None:
        await self._client.close()


class CommandTransport:
    """A program on this machine."""

    def __init__(self, endpoint: CommandEndpoint, scripts: Scripts) -> None:
        self._endpoint = endpoint
        self._scripts = scripts

    async def send(self, delivery: Outgoing) -> Attempt:
        endpoint = self._endpoint
        return await self._scripts.run(
            endpoint.command, endpoint.timeout, kind=delivery.type, key=delivery.key, body=delivery.payload
        )

    async def close(self) -> None:
        """There is nothing to release."""
