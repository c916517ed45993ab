"""Choose the chat model: a real one where the environment has a key, else the offline one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agentscope.credential import DashScopeCredential, OpenAICredential
from agentscope.model import DashScopeChatModel, OpenAIChatModel
from pydantic import SecretStr

from examples.travel_assistant.offline_model import OfflineModel, Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentscope.model import ChatModelBase

__all__ = ["choose_model"]


def choose_model(policy: Policy, environ: Mapping[str, str] | None = None) -> ChatModelBase:
    """Choose the model of an agent.

    `DASHSCOPE_API_KEY` (with `DASHSCOPE_BASE_URL` where it is not the default region) takes DashScope, by default
    `qwen-plus`; `OPENAI_API_KEY` and `OPENAI_BASE_URL`, one of them or both, take any OpenAI-compatible endpoint, by default
    `gpt-4.1`. `MODEL` names another model; `MODEL=offline` keeps to the offline one whatever keys there are.

    Args:
        policy: What the offline model follows.
        environ: The variables; None takes those of the process.
    """
    source = os.environ if environ is None else environ
    model = source.get("MODEL", "")
    dashscope_key = source.get("DASHSCOPE_API_KEY", "")
    openai_key, openai_url = source.get("OPENAI_API_KEY", ""), source.get("OPENAI_BASE_URL", "")
    if model != "offline" and dashscope_key:
        credential = DashScopeCredential(api_key=SecretStr(dashscope_key))
        credential.base_url = source.get("DASHSCOPE_BASE_URL") or credential.base_url
        return DashScopeChatModel(credential=credential, model=model or "qwen-plus")
    if model != "offline" and (openai_key or openai_url):
        # Local servers want no key, but the client does not start without one.
        key = SecretStr(openai_key or "none")
        return OpenAIChatModel(
            credential=OpenAICredential(api_key=key, base_url=openai_url or None),
            model=model or "gpt-4.1",
        )
    return OfflineModel(policy)
