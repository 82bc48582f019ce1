"""The whole configuration: every section, and the rules between sections."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from notify_server.config.forward import AlertConfig, Forward
from notify_server.config.sections import (
    AckConfig,
    AuthConfig,
    ContractConfig,
    LogConfig,
    RetentionConfig,
    ServerConfig,
    StoreConfig,
    VerifyConfig,
)


class Config(BaseModel):
    """The whole configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    server: ServerConfig = Field(default_factory=ServerConfig)
    auth: AuthConfig = Field(default_factory=AuthConfig)
    ack: AckConfig = Field(default_factory=AckConfig)
    contract: ContractConfig = Field(default_factory=ContractConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    retention: RetentionConfig = Field(default_factory=RetentionConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    forward: Forward = ()
    alert: AlertConfig = Field(default_factory=AlertConfig)

    @model_validator(mode="after")
    def _one_server_does_both(self) -> Self:
        server = self.server
        if not (self.store.is_postgres or (server.takes_callbacks and server.probes)):
            raise ValueError(
                "must be both with a file of SQLite, which one server has to itself: share a database, [store] url = "
                '"postgresql://…", or leave this out'
            )
        return self
