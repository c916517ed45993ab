"""The official generated protocol of RocketMQ 5, and nothing else of the official client.

`import rocketmq` configures logging, makes a log folder in the home directory, and loads every class of the client
(half a second). The generated modules need none of that, but live below that package. They are therefore loaded
beneath an empty stand-in for it, which is taken away again: a program that later imports the official client gets
the real package, sharing these very modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

__all__ = [
    "MessagingServiceServicer",
    "MessagingServiceStub",
    "add_servicer",
    "definition",
    "service",
]

_PACKAGE = "rocketmq"
_lock = threading.Lock()


def _load(name: str) -> Any:
    with _lock:
        if _PACKAGE in sys.modules:
            return importlib.import_module(name)
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(
                "The RocketMQ protocol stubs are missing: install rocketmq-python-client>=5.1.2. "
                "(rocketmq-client-python is another, older package without LiteTopics.)"
            )
        stand_in = ModuleType(_PACKAGE)
        stand_in.__path__ = list(spec.submodule_search_locations)
        sys.modules[_PACKAGE] = stand_in
        try:
            return importlib.import_module(name)
        finally:
            del sys.modules[_PACKAGE]


definition: Any = _load("rocketmq.grpc_protocol.definition_pb2")
service: Any = _load("rocketmq.grpc_protocol.service_pb2")
_grpc: Any = _load("rocketmq.grpc_protocol.service_pb2_grpc")
MessagingServiceStub: Any = _grpc.MessagingServiceStub
MessagingServiceServicer: Any = _grpc.MessagingServiceServicer
add_servicer: Any = _grpc.add_MessagingServiceServicer_to_server
