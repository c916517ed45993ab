"""Which module may know what: the layers of the package, read from the imports in its source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "agentscope_rocketmq"
ROOT = Path(__file__).parent.parent / PACKAGE

# The core: values and protocol, no I/O. What is below each may be imported by those above it.
CORE = (
    "errors",
    "cursor",
    "blobs",
    "config",
    "jsonrpc",
    "sse",
    "priority",
    "card",
    "fields",
    "envelope",
    "spool",
    "rerun",
    "exchange",
    "replay",
    "taps",
    "reply",
    "routes",
    "owners",
)
# What a variable of the environment asks for is imported only when it does.
MADE_ON_DEMAND = {"config": {f"{PACKAGE}.directory", f"{PACKAGE}.directory.DirectoryBlobStore"}}
IO_LIBRARIES = {"agentscope", "anyio", "asyncio", "grpc", "httpx", "rocketmq", "socket", "starlette", "uvicorn"}
# These are handed their RocketMQ connection; they neither build one nor know who does.
HANDED = (
    "transport",
    "carrier",
    "bodies",
    "claims",
    "bridge",
    "application",
    "handover",
    "taskchannels",
    "publisher",
    "questions",
    "runs",
    "slots",
    "suspects",
    "session",
    "channel",
    "channels",
    "reading",
    "pending",
    "listening",
    "survey",
)
BUILDERS = {f"{PACKAGE}.{name}" for name in ("client", "server", "gateway", "cli", "dev")}
# The edge to the SDK: its transport, the HTTP client of its push notifications, and the fetching of cards.
HTTPX_USERS = ("transport", "client", "app", "fetch")


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def imports(source: str, module: str) -> set[str]:
    """Every module that a source imports, anywhere in it, also for type checking only."""
    return _imports(ast.parse(source), module)


def runtime_imports(source: str, module: str) -> set[str]:
    """The same without what is imported for type checking only."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return _imports(tree, module)


def _imports(tree: ast.Module, module: str) -> set[str]:
    found: set[str] = set()
    package = f"{PACKAGE}.{module}".split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found.add(origin)
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def imports_any(found: set[str], wanted: set[str]) -> set[str]:
    return {name for name in found for other in wanted if name == other or name.startswith(f"{other}.")}


def within(module: str, rooms: tuple[str, ...]) -> bool:
    return module.split(".", maxsplit=1)[0] in rooms


SOURCES = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
FOUND = {name: imports(source, name) for name, source in SOURCES.items()}


def test_the_reader_of_imports_sees_all_of_them():
    source = (
        "import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\n"
        "def later():\n    import h\nif TYPE_CHECKING:\n    from i.j import k\n"
    )
    assert imports(source, "rocketmq.lite") >= {
        "a.b",
        "c.d",
        f"{PACKAGE}.rocketmq.e",
        f"{PACKAGE}.rocketmq.f.g",
        "h",
        "i.j",
    }
    assert "i.j" not in runtime_imports(source, "rocketmq.lite")
    assert "h" in runtime_imports(source, "rocketmq.lite")
    assert imports_any({"grpc.aio", "grpcio", "os"}, {"grpc"}) == {"grpc.aio"}


def test_every_module_of_the_core_is_there():
    assert set(CORE) <= set(FOUND)


@pytest.mark.parametrize("module", sorted(FOUND))
def test_only_the_rocketmq_client_and_the_brokers_know_the_protocol(module):
    if not within(module, ("rocketmq", "dev")):
        assert imports_any(FOUND[module], {"grpc", "rocketmq"}) == set()


@pytest.mark.parametrize("module", sorted(FOUND))
def test_only_the_edge_to_the_sdk_knows_httpx(module):
    if not within(module, (*HTTPX_USERS, "cli", "dev")):
        assert imports_any(FOUND[module], {"httpx"}) == set()


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_no_io(module):
    assert imports_any(FOUND[module], IO_LIBRARIES) == set()
    below = {f"{PACKAGE}.{name}" for name in CORE}
    own = {name for name in FOUND[module] if name.startswith(PACKAGE)} - MADE_ON_DEMAND.get(module, set())
    assert own == imports_any(own, below)


@pytest.mark.parametrize("module", sorted(FOUND))
def test_the_rocketmq_client_and_the_brokers_know_only_the_core(module):
    if within(module, ("rocketmq", "dev")):
        allowed = {f"{PACKAGE}.{name}" for name in (*CORE, "rocketmq", "dev", "_version")}
        own = {name for name in FOUND[module] if name.startswith(f"{PACKAGE}.")}
        assert own == imports_any(own, allowed)


@pytest.mark.parametrize("module", sorted(FOUND))
def test_who_is_handed_a_connection_builds_none(module):
    if not within(module, HANDED):
        return
    assert imports_any(FOUND[module], BUILDERS) == set()
    connection = {f"{PACKAGE}.rocketmq.connection", f"{PACKAGE}.rocketmq.client"}
    assert imports_any(runtime_imports(SOURCES[module], module), connection) == set()


@pytest.mark.parametrize("module", sorted(FOUND))
def test_nothing_below_knows_the_command_line(module):
    if not within(module, ("cli",)):
        assert imports_any(FOUND[module], {f"{PACKAGE}.cli"}) == set()
