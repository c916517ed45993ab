"""Settings: what can't be right is refused at once, with the field's name and without its secret."""

from __future__ import annotations

import pytest

from agentscope_rocketmq import DirectoryBlobStore, RocketMQ, RocketMQConfig
from agentscope_rocketmq.errors import ConfigurationError

KEYS = {"access_key": "an-access-key", "secret_key": "a-secret-key"}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("namespace", {"namespace": "a b"}),
        ("namespace", {"namespace": "a/b"}),
        ("namespace", {"namespace": "n" * 128}),
        ("allowed_reply_topics", {"allowed_reply_topics": ("Good", "not good")}),
        ("allowed_reply_topics", {"allowed_reply_topics": ("",)}),
        ("access_key", KEYS | {"access_key": "ключ"}),
        ("access_key", KEYS | {"access_key": "two words"}),
        ("access_key", KEYS | {"access_key": "a,b"}),
        ("access_key", KEYS | {"access_key": "line\nbreak"}),
        ("access_key", KEYS | {"access_key": ""}),
        ("secret_key", KEYS | {"secret_key": ""}),
        ("secret_key", KEYS | {"secret_key": "half \ud800 a pair"}),
        ("a2a_secret", {"a2a_secret": ""}),
        ("timeouts.lease", {"timeouts": {"lease": float("inf")}}),
        ("timeouts.lease", {"timeouts": {"lease": 100_000}}),
        ("timeouts.idle", {"timeouts": {"idle": float("nan")}}),
    ],
)
def test_a_value_that_can_not_be_right_is_refused_by_its_name(field, values):
    with pytest.raises(ConfigurationError, match=field) as caught:
        RocketMQConfig(**values)
    for secret in ("a-secret-key", "half"):
        assert secret not in str(caught.value)


def test_what_rocketmq_takes_is_taken():
    config = RocketMQConfig(
        namespace="team-a|b", allowed_reply_topics=("One", "Two_2"), access_key="AK/!+=~", secret_key="geheim-ü"
    )
    assert config.reply_topics == {"WorkerAgentResponse", "One", "Two_2"}


def test_the_environment_is_checked_as_arguments_are():
    with pytest.raises(ConfigurationError, match="namespace"):
        RocketMQConfig.from_env({"ROCKETMQ_NAMESPACE": "a b"})
    with pytest.raises(ConfigurationError, match="allowed_reply_topics"):
        RocketMQConfig.from_env({"ROCKETMQ_ALLOWED_REPLY_TOPICS": "Good, not good"})


def test_a_blob_store_is_named_by_the_environment():
    store = RocketMQConfig.from_env({"ROCKETMQ_BLOBS": "bodies=/mnt/shared/a=b"}).blobs
    assert isinstance(store, DirectoryBlobStore)
    assert (store.name, str(store.path)) == ("bodies", "/mnt/shared/a=b")
    for text in ("/mnt/shared", "bodies=", "=/mnt/shared", "a b=/mnt/shared"):
        with pytest.raises(ConfigurationError, match=r"NAME=DIRECTORY|name of a blob store"):
            RocketMQConfig.from_env({"ROCKETMQ_BLOBS": text})


@pytest.mark.parametrize("session", ["", "\ud800", 42, b"trip"])
async def test_what_is_no_name_of_a_session_is_refused_before_anything_else(session):
    async with RocketMQ(RocketMQConfig(), card_cache=None) as rocketmq:
        for door in (rocketmq.client, rocketmq.agent):
            with pytest.raises(ConfigurationError, match=r"session|Session"):
                await door("no-such-card.json", session=session)
