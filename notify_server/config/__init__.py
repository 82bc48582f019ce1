"""The configuration: value types, sections, the whole of it, and loading."""

from notify_server.config.forward import AlertConfig
from notify_server.config.loading import ENV_PREFIX, load_config
from notify_server.config.root import Config
from notify_server.config.sections import (
    AckConfig,
    AuthConfig,
    ContractConfig,
    HostSettings,
    LogConfig,
    RetentionConfig,
    ServerConfig,
    StoreConfig,
    UsableConfig,
    VerifyConfig,
    version,
)
from notify_server.config.values import IPNetwork, Role, StatusRange, without_secrets

__all__ = [
    "ENV_PREFIX",
    "AckConfig",
    "AlertConfig",
    "AuthConfig",
    "Config",
    "ContractConfig",
    "HostSettings",
    "IPNetwork",
    "LogConfig",
    "RetentionConfig",
    "Role",
    "ServerConfig",
    "StatusRange",
    "StoreConfig",
    "UsableConfig",
    "VerifyConfig",
    "load_config",
    "version",
    "without_secrets",
]
