"""What `import agentscope_rocketmq` gives, and what it does not do."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import agentscope_rocketmq
from agentscope_rocketmq import errors

PACKAGE = Path(agentscope_rocketmq.__file__).parent


def test_every_public_name_is_there_and_none_is_missing_from_all():
    assert agentscope_rocketmq.__all__ == sorted(set(agentscope_rocketmq.__all__), key=_ruffs_order)
    for name in agentscope_rocketmq.__all__:
        assert getattr(agentscope_rocketmq, name) is not None
    assert set(agentscope_rocketmq._HOMES) == set(agentscope_rocketmq.__all__) - {"__version__"}
    assert dir(agentscope_rocketmq) == sorted(agentscope_rocketmq.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = agentscope_rocketmq.NoSuchName


def test_every_modules_all_names_what_is_defined_there():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("agentscope_rocketmq", *path.relative_to(PACKAGE).with_suffix("").parts))
        module = module.removesuffix(".__init__")
        if module.endswith("__main__"):
            continue
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", []):
            assert hasattr(loaded, name), f"{module}.__all__ names {name}"


def test_all_errors_are_in_one_tree_that_its_module_draws():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert {error.__name__ for error in classes} == set(errors.__all__)
    for error in classes:
        assert issubclass(error, errors.AgentScopeRocketMQError)
        assert error.__name__ in errors.__doc__


def test_importing_the_package_is_quick_and_leaves_no_trace(tmp_path):
    code = (
        "import sys, agentscope_rocketmq, agentscope_rocketmq.rocketmq.protocol\n"
        "heavy = {'agentscope', 'a2a', 'rocketmq'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import rocketmq.grpc_protocol.service_pb2 as theirs\n"
        "assert theirs is agentscope_rocketmq.rocketmq.protocol.service\n"
    )
    subprocess.run(
        [sys.executable, "-c", code.split("import rocketmq.grpc", maxsplit=1)[0]],
        check=True,
        env={"HOME": str(tmp_path)},
    )
    assert list(tmp_path.iterdir()) == []
    # The official client stays importable beside ours, with the same protocol classes.
    subprocess.run([sys.executable, "-c", code], check=True, env={"HOME": str(tmp_path)})


def test_no_module_is_too_long_for_a_sitting():
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 520} == {}


def test_every_public_function_and_class_has_a_docstring():
    missing = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                public = not node.name.startswith("_")
                if public and isinstance(node, ast.ClassDef) and ast.get_docstring(node) is None:
                    missing.append(f"{path.name}:{node.name}")
    assert missing == []


def _ruffs_order(name):
    # Ruff sorts __all__ as isort does: constants, classes, the rest.
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)
