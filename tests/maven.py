"""Maven projects of the tests, built once and run in small JVMs."""

from __future__ import annotations

import functools
import hashlib
import shutil
from typing import TYPE_CHECKING

from agentscope_rocketmq.dev.folders import file_lock
from agentscope_rocketmq.dev.maven import run_maven

if TYPE_CHECKING:
    from pathlib import Path

BUILD_SECONDS = 1200.0


@functools.cache
def built(project: Path, goal: str) -> Path:
    """The `target` folder of a project, built first when its sources changed; processes take turns."""
    target = project / "target"
    target.mkdir(exist_ok=True)
    sources = sorted(path for path in (project / "src").rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [project / "pom.xml", *sources])).hexdigest()
    stamp = target / "built"
    with file_lock(target / ".lock", timeout=BUILD_SECONDS):
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != digest:
            run_maven(project, goal, wanted=f"build the Maven project {project}")
            stamp.write_text(digest, encoding="utf-8")
    return target


def java(home: Path) -> list[str]:
    """The command that starts a JVM with a home folder, which is where the official client writes its log."""
    command = shutil.which("java")
    assert command is not None, "scripts/tools installs it"
    # One compiler and one collector thread: quick to start, and easy on a machine that runs everything else too.
    return [command, "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", f"-Duser.home={home}"]
