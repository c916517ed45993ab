"""Gets the jars of Apache RocketMQ by Maven, once for each user and version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from agentscope_rocketmq.dev.folders import file_lock
from agentscope_rocketmq.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ROCKETMQ_VERSION", "default_cache", "rocketmq_jars", "run_maven"]

ROCKETMQ_VERSION = "5.5.0"
"""The first release with LiteTopics."""

MAVEN_TIMEOUT = 1200.0
"""Seconds that a download of some 100 MB may take."""

_ARTIFACTS = ("rocketmq-namesrv", "rocketmq-proxy", "rocketmq-tools")
_COPY_DEPENDENCIES = "dependency:copy-dependencies"
_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId>
  <artifactId>rocketmq-jars</artifactId>
  <version>1</version>
  <dependencies>
{dependencies}
  </dependencies>
</project>
"""
_DEPENDENCY = """\
    <dependency>
      <groupId>org.apache.rocketmq</groupId>
      <artifactId>{artifact}</artifactId>
      <version>{version}</version>
    </dependency>"""
_LOG_TAIL = 15


def default_cache() -> Path:
    """`agentscope-rocketmq` in the folder for what can be fetched again: `XDG_CACHE_HOME`, else the platform's own."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):  # noqa: PTH117  (the specification: a relative path is to be ignored)
        base = Path(configured)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "agentscope-rocketmq"


def rocketmq_jars(cache: Path | None, on_progress: Callable[[str], None]) -> Path:
    """The folder that holds RocketMQ's jars, fetched first if need be.

    The folder appears in one rename, so it is complete or absent; processes that want it at once take turns.

    Args:
        cache: Where `rocketmq-VERSION/lib` is kept; None takes `default_cache()`.
        on_progress: Told what is going on when it takes long.

    Raises:
        ConfigurationError: Maven is missing, or could not get the jars; the message says what to do.
    """
    home = (cache or default_cache()) / f"rocketmq-{ROCKETMQ_VERSION}"
    jars = home / "lib"
    if jars.is_dir():
        return jars
    home.mkdir(parents=True, exist_ok=True)
    with file_lock(home / ".lock", timeout=MAVEN_TIMEOUT):
        if not jars.is_dir():
            on_progress(f"Fetching Apache RocketMQ {ROCKETMQ_VERSION} by Maven (100 MB, once) …")
            with tempfile.TemporaryDirectory(dir=home, prefix="fetching-") as work:
                _fetch(Path(work))
                (Path(work) / "lib").rename(jars)
    return jars


def run_maven(folder: Path, *arguments: str, wanted: str) -> None:
    """Run Maven on the project in a folder.

    Args:
        folder: The folder with its `pom.xml`.
        *arguments: Goals and options.
        wanted: What it is to bring about, for the error: "fetch Apache RocketMQ 5.5.0".

    Raises:
        ConfigurationError: There is no Maven, it failed, or took too long; the message says what to do.
    """
    maven = shutil.which("mvn")
    if maven is None:
        raise ConfigurationError(
            f"Maven is needed to {wanted}, and there is no `mvn` on the PATH: install Maven 3.6 or newer "
            "(Debian: apt install maven; macOS: brew install maven)."
        )
    try:
        result = subprocess.run(  # noqa: PLW1510  (the exit code is looked at below)
            [maven, "--batch-mode", "--quiet", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=MAVEN_TIMEOUT,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"Maven did not {wanted} within {MAVEN_TIMEOUT:g} s: check the network and try again."
        ) from None
    if result.returncode != 0:
        tail = "\n".join(result.stdout.strip().splitlines()[-_LOG_TAIL:])
        raise ConfigurationError(
            f"Maven could not {wanted} (exit code {result.returncode}): check the network and Maven's settings.\n{tail}"
        )


def _fetch(work: Path) -> None:
    dependencies = "\n".join(_DEPENDENCY.format(artifact=artifact, version=ROCKETMQ_VERSION) for artifact in _ARTIFACTS)
    (work / "pom.xml").write_text(_POM.format(dependencies=dependencies), encoding="utf-8")
    wanted = f"fetch Apache RocketMQ {ROCKETMQ_VERSION}"
    run_maven(work, _COPY_DEPENDENCIES, f"-DoutputDirectory={work / 'lib'}", wanted=wanted)
