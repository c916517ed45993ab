"""What README and docs show is run as it stands there; what they name exists."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from agentscope_rocketmq.cli import app
from agentscope_rocketmq.config import RocketMQConfig
from agentscope_rocketmq.provision import apply, plan
from tests.waiting import LIMIT, closed_port

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@contextlib.asynccontextmanager
async def chat_model(answer: str):
    """A stand-in for an OpenAI-compatible endpoint that says one thing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.split("content-length:")[1].split()[0]))
        choice = {"index": 0, "delta": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        writer.write(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@pytest.mark.xdist_group("the demo's own topics")
async def test_the_service_and_the_caller_of_the_readme_talk_to_each_other(engine, tmp_path):
    [card] = blocks("json")
    service, caller = blocks("python")
    assert len([line for line in service.splitlines() if line]) <= 17
    assert len([line for line in caller.splitlines() if line]) <= 11
    port = str(closed_port())
    (tmp_path / "card.json").write_text(card, encoding="utf-8")
    (tmp_path / "service.py").write_text(service.replace("10001", port), encoding="utf-8")
    (tmp_path / "caller.py").write_text(caller.replace("10001", port), encoding="utf-8")
    config = RocketMQConfig(endpoint=engine.endpoint, namesrv=engine.namesrv)
    await apply(
        plan([json.loads(card.replace("${ROCKETMQ_ENDPOINT:-127.0.0.1:8081}", engine.endpoint))], config), config
    )
    async with chat_model("It will rain, take a coat.") as url, asyncio.timeout(2 * LIMIT):
        environ = os.environ | {
            "ROCKETMQ_ENDPOINT": engine.endpoint,
            "OPENAI_API_KEY": "none",
            "OPENAI_BASE_URL": url,
            "XDG_CACHE_HOME": str(tmp_path),
        }
        serving = await asyncio.create_subprocess_exec(sys.executable, "service.py", cwd=tmp_path, env=environ)
        try:
            await _listening(int(port))
            calling = await asyncio.create_subprocess_exec(
                sys.executable, "caller.py", cwd=tmp_path, env=environ, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await calling.communicate()
        finally:
            serving.send_signal(signal.SIGTERM)
            await serving.wait()
    assert output.decode().strip().endswith("It will rain, take a coat.")
    assert (calling.returncode, serving.returncode) == (0, 0)


async def _listening(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), target
        assert path or anchor in headings, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_scripts_that_are_shown_exist(page):
    text = page.read_text(encoding="utf-8")
    known = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    known |= {str(group.name) for group in app.registered_groups}
    for command in re.findall(r"agentscope-rocketmq ([a-z][a-z-]+)", text):
        assert command in known, command
    for script in re.findall(r"\bscripts/([a-z]+)", text):
        assert (ROOT / "scripts" / script).exists(), script


def test_every_environment_variable_of_the_configuration_is_in_the_readme():
    for field in RocketMQConfig.model_fields:
        if field not in ("blobs", "timeouts", "limits"):
            assert f"ROCKETMQ_{field.upper()}" in README


def test_every_dependency_earns_its_place_in_a_line():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^    "([A-Za-z0-9-]+)(?:\[[a-z-]+\])?[>=<]', project, flags=re.MULTILINE)
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert len(listed) > 10
    assert [name for name in listed if f"`{name}" not in page] == []
