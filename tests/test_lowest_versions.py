"""The lowest versions that pyproject.toml allows really work together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUITES = (
    "tests/test_a2a_methods.py",
    "tests/test_card.py",
    "tests/test_workers.py::test_two_supervisors_each_receive_on_their_own_lite_topic",
    "tests/test_travel_assistant.py::test_the_weather_found_is_in_the_message_on_the_travel_topic_and_in_the_plan",
)
# rocketmq-python-client asks for any grpcio-tools, though it uses none; old ones can't be built any more.
CONSTRAINTS = "grpcio-tools>=1.68\n"


@pytest.fixture(scope="module")
def lowest_python(tmp_path_factory):
    """An environment of its own with those versions; uv's cache makes it quick to build again."""
    folder = tmp_path_factory.mktemp("lowest")
    python = folder / "venv" / "bin" / "python"
    constraints = folder / "constraints.txt"
    constraints.write_text(CONSTRAINTS)
    _uv("venv", str(folder / "venv"), "--python", sys.executable)
    install = ("pip", "install", "--python", str(python))
    _uv(*install, "--resolution", "lowest-direct", "--constraint", str(constraints), str(ROOT))
    _uv(*install, "pytest", "pytest-asyncio", "pytest-xdist", "hypothesis")
    return python


def test_every_method_works_on_the_lowest_versions_allowed(lowest_python, engine, tmp_path):
    environ = os.environ | {"ROCKETMQ_NAMESRV": engine.namesrv, "PYTHONPATH": str(ROOT)}
    for inherited in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        environ.pop(inherited, None)
    done = subprocess.run(
        [
            *(str(lowest_python), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            # Old versions warn of what later ones dropped; that is theirs.
            *("-W", "default", "--engine", engine.endpoint, *SUITES),
        ],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def _uv(*arguments):
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run([str(uv), *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
