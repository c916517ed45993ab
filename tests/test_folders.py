"""Temporary folders of processes that are killed are removed by those that come after them, and no others."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

from agentscope_rocketmq.dev.folders import file_lock, temporary_folder
from agentscope_rocketmq.errors import ConfigurationError

OWNER = """
from agentscope_rocketmq.dev.folders import temporary_folder
with temporary_folder("leftover-") as folder:
    (folder / "store").mkdir()
    (folder / "store" / "messages").write_text("many")
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder, for these tests alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def owner():
    """A process that has such a folder, and the folder."""
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_a_folder_is_gone_at_the_end(temporary):
    with temporary_folder("leftover-") as folder:
        assert folder.parent == temporary
        assert folder.name.startswith("leftover-")
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next(owner, temporary):
    process, left = owner
    process.kill()
    process.wait()
    assert [str(path) for path in temporary.iterdir()] == [left]
    with temporary_folder("leftover-") as folder:
        assert list(temporary.iterdir()) == [folder]


def test_the_folder_of_a_living_process_stays(owner, temporary):
    _, used = owner
    with temporary_folder("leftover-"):
        pass
    assert [str(path) for path in temporary.iterdir()] == [used]
    assert (temporary / used / "store" / "messages").read_text() == "many"


def test_what_is_no_such_folder_stays(temporary):
    (temporary / "leftover-file").write_text("somebody's")
    (temporary / "leftover-folder").mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".lock").touch()
    (temporary / "leftover-link").symlink_to(elsewhere)
    before = sorted(temporary.rglob("*"))
    with temporary_folder("leftover-"):
        pass
    assert sorted(temporary.rglob("*")) == before


def test_a_lock_has_one_holder(temporary):
    with (
        file_lock(temporary / ".lock", timeout=0),
        pytest.raises(ConfigurationError, match="in use by another process"),
        file_lock(temporary / ".lock", timeout=0),
    ):
        pass
    with file_lock(temporary / ".lock", timeout=0):
        pass
