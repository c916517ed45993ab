"""Agent cards: the RocketMQ address in them, both forms, and what each kind of reader needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from a2a.types import AgentCard, AgentCardSignature, AgentInterface
from hypothesis import given, settings
from hypothesis import strategies as st

from agentscope_rocketmq.card import (
    Address,
    Choice,
    card_to_dict,
    choose,
    complete_card,
    jsonrpc_url,
    parse_card,
    read_card,
    rocketmq_addresses,
)
from agentscope_rocketmq.errors import CardError

if TYPE_CHECKING:
    from pathlib import Path

HTTP = "http://127.0.0.1:10001/"
MQ = "http://127.0.0.1:8081//WeatherAgentTask"
BASE: dict[str, Any] = {
    "name": "WeatherAgent",
    "description": "Answers questions about the weather.",
    "version": "1.0.0",
    "capabilities": {"streaming": True},
    "defaultInputModes": ["text"],
    "defaultOutputModes": ["text"],
    "skills": [{"id": "weather", "name": "Weather", "description": "Forecasts.", "tags": ["weather"]}],
}
OLD_FORM = BASE | {
    "protocolVersion": "0.3.0",
    "url": MQ,
    "preferredTransport": "RocketMQ",
    "additionalInterfaces": [{"url": MQ, "transport": "RocketMQ"}, {"url": HTTP, "transport": "JSONRPC"}],
}


def card(*interfaces: tuple[str, str, str]) -> AgentCard:
    parsed = parse_card(BASE)
    for binding, url, version in interfaces:
        parsed.supported_interfaces.append(AgentInterface(url=url, protocol_binding=binding, protocol_version=version))
    return parsed


def listed(parsed: AgentCard) -> list[tuple[str, str, str]]:
    return [(e.protocol_binding, e.url, e.protocol_version) for e in parsed.supported_interfaces]


# Addresses


@pytest.mark.parametrize(
    ("url", "address"),
    [
        (MQ, Address("127.0.0.1:8081", "", "WeatherAgentTask")),
        ("https://mq.example.com:443/ns-1/T_1", Address("mq.example.com:443", "ns-1", "T_1", secure=True)),
        ("HTTP://[::1]:8081//T", Address("[::1]:8081", "", "T")),
        ("http://a:1;b:2//T", Address("a:1;b:2", "", "T")),
        ("http://a:1,b:2/ns/T", Address("a:1;b:2", "ns", "T")),
    ],
)
def test_an_address_is_read_and_written_back(url, address):
    assert Address.parse(url) == address
    assert Address.parse(address.url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8081//T",
        "rocketmq://127.0.0.1:8081//T",
        "ftp://127.0.0.1:8081//T",
        "http://127.0.0.1:8081/T",
        "http://127.0.0.1:8081//",
        "http://127.0.0.1:8081///T",
        "http://127.0.0.1:8081/ns/T/",
        "http://127.0.0.1:8081/ns/T/more",
        "http://127.0.0.1:8081//T?x=1",
        "http://127.0.0.1:8081//T#x",
        "http://127.0.0.1:8081//T\n",
        "http://127.0.0.1:8081//天气",
        "http://127.0.0.1:8081//" + "t" * 128,
        "http://127.0.0.1:8081/a b/T",
        "http://127.0.0.1//T",
        "http://:8081//T",
        "http://127.0.0.1:99999//T",
        "http:////T",
    ],
)
def test_anything_else_is_no_address(url):
    with pytest.raises(CardError, match="http://"):
        Address.parse(url)


def test_a_password_in_an_address_is_not_repeated():
    with pytest.raises(CardError) as caught:
        Address.parse("http://user:hunter2@127.0.0.1:8081//T")
    assert "hunter2" not in str(caught.value)


# Reading


def test_both_forms_are_read_and_left_as_they_are():
    new = BASE | {"supportedInterfaces": [{"url": MQ, "protocolBinding": "RocketMQ", "protocolVersion": "1.0"}]}
    for fields in (new, OLD_FORM):
        before = json.dumps(fields)
        from_map, from_text = parse_card(fields), parse_card(before)
        assert json.dumps(fields) == before
        assert from_map == from_text
        assert rocketmq_addresses(from_map) == [Address.parse(MQ)]
    assert listed(parse_card(OLD_FORM)) == [
        ("RocketMQ", MQ, "0.3.0"),
        ("RocketMQ", MQ, "0.3.0"),
        ("JSONRPC", HTTP, "0.3.0"),
    ]


def test_a_card_is_copied():
    original = card(("RocketMQ", MQ, "1.0"))
    copied = parse_card(original)
    assert copied == original
    copied.name = "other"
    assert original.name == "WeatherAgent"


@pytest.mark.parametrize(
    "data",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        {"name": 1},
        {"skills": ["x"]},
        {"skills": 3},
        {"securitySchemes": {"a": 1}},
        {"security": [1]},
        {"url": "http://a:1//T", "additionalInterfaces": ["x"]},
        {"url": "http://a:1//T", "additionalInterfaces": {"a": 1}},
        {"capabilities": "x", "supportsAuthenticatedExtendedCard": True},
    ],
)
def test_what_is_no_card_is_refused(data):
    with pytest.raises(CardError):
        parse_card(data)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*OLD_FORM, "supportedInterfaces", "security", "securitySchemes", "signatures"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=8,
        ),
    )
)
def test_reading_an_unknown_card_raises_nothing_else(fields):
    try:
        parsed = parse_card(fields)
    except CardError:
        return
    assert isinstance(parsed, AgentCard)


def test_placeholders_are_filled_in(tmp_path: Path):
    path = tmp_path / "card.json"
    fields = BASE | {
        "description": "${TEXT} and ${EMPTY:-a default} and $HOME and ${not one}",
        "supportedInterfaces": [
            {
                "url": "http://${ROCKETMQ_ENDPOINT:-127.0.0.1:8081}/${NS:-}/WeatherAgentTask",
                "protocolBinding": "RocketMQ",
                "protocolVersion": "1.0",
            }
        ],
    }
    path.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    text = 'quote " brace } ${TEXT} 杭州'
    parsed = read_card(path, {"TEXT": text, "EMPTY": ""})
    assert parsed.description == f"{text} and a default and $HOME and ${{not one}}"
    assert rocketmq_addresses(parsed) == [Address.parse(MQ)]
    moved = read_card(path, {"TEXT": "", "ROCKETMQ_ENDPOINT": "mq:1", "NS": "ns"})
    assert rocketmq_addresses(moved) == [Address("mq:1", "ns", "WeatherAgentTask")]


def test_placeholders_come_from_the_process_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(BASE | {"name": "${AGENT_NAME}"}), encoding="utf-8")
    monkeypatch.setenv("AGENT_NAME", "Weather")
    assert read_card(str(path)).name == "Weather"


def test_a_placeholder_without_a_value_is_named(tmp_path: Path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(BASE | {"name": "${AGENT_NAME}"}), encoding="utf-8")
    with pytest.raises(CardError, match="AGENT_NAME") as caught:
        read_card(path, {})
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_card_is_named(tmp_path: Path):
    with pytest.raises(CardError, match=r"nowhere\.json"):
        read_card(tmp_path / "nowhere.json")
    for number, data in enumerate((b"{", b"\xff", b"[]")):
        path = tmp_path / f"bad{number}.json"
        path.write_bytes(data)
        with pytest.raises(CardError, match=f"bad{number}"):
            read_card(path)


# Choosing


def test_addresses_are_listed_once_and_in_order():
    other = "http://mq:1/ns/Other"
    parsed = card(
        ("RocketMQ", MQ, "1.0"), ("JSONRPC", HTTP, "1.0"), ("RocketMQ", other, "1.0"), ("RocketMQ", MQ, "0.3")
    )
    assert rocketmq_addresses(parsed) == [Address.parse(MQ), Address.parse(other)]
    assert rocketmq_addresses(card()) == []


def test_the_newest_version_that_both_know_is_chosen():
    def rocketmq(*versions: str) -> AgentCard:
        return card(*(("RocketMQ", f"http://mq:1//V{n}", version) for n, version in enumerate(versions)))

    def chosen(*versions: str) -> str:
        return choose(rocketmq(*versions), allow_jsonrpc=False).version

    assert chosen("0.3", "1.0") == "1.0"
    assert chosen("0.3.0", "1.0.2") == "1.0.2"
    assert chosen("2.0", "1.0") == "1.0"
    assert chosen("0.3", "1.1") == "1.1"
    assert chosen("", "0.3.0") == "0.3.0"
    assert chosen("") == ""
    with pytest.raises(CardError, match=r"0\.2\.5"):
        chosen("0.2.5", "junk")


def test_rocketmq_comes_before_json_rpc():
    both = card(("JSONRPC", HTTP, "1.0"), ("RocketMQ", MQ, "0.3"))
    assert choose(both, allow_jsonrpc=True) == Choice(binding="RocketMQ", url=MQ, version="0.3")


def test_json_rpc_is_taken_only_where_it_is_allowed():
    http_only = card(("JSONRPC", HTTP, "1.0"), ("GRPC", "grpc://a", "1.0"))
    assert choose(http_only, allow_jsonrpc=True) == Choice(binding="JSONRPC", url=HTTP, version="1.0")
    with pytest.raises(CardError, match=r"JSONRPC 1\.0, GRPC 1\.0.*allow JSON-RPC"):
        choose(http_only, allow_jsonrpc=False)
    with pytest.raises(CardError, match="no interface"):
        choose(card(), allow_jsonrpc=True)


def test_the_label_is_case_sensitive():
    with pytest.raises(CardError):
        choose(card(("ROCKETMQ", MQ, "1.0")), allow_jsonrpc=True)


def test_a_malformed_address_is_no_reason_to_take_another_way_silently():
    with pytest.raises(CardError, match="address"):
        choose(card(("RocketMQ", "http://mq:1/T", "1.0"), ("JSONRPC", HTTP, "1.0")), allow_jsonrpc=True)


def test_the_json_rpc_url_is_that_of_the_newest_version():
    assert jsonrpc_url(card(("JSONRPC", "http://old/", "0.3"), ("JSONRPC", "http://new/", "1.0"))) == "http://new/"
    assert jsonrpc_url(card(("RocketMQ", MQ, "1.0"))) is None


# Completing


def test_a_completed_card_is_what_every_reader_needs():
    completed = complete_card(card(("RocketMQ", MQ, "1.0")), jsonrpc_url=HTTP)
    assert listed(completed) == [
        ("JSONRPC", HTTP, "1.0"),
        ("RocketMQ", MQ, "1.0"),
        ("JSONRPC", HTTP, "0.3"),
        ("RocketMQ", MQ, "0.3"),
    ]
    fields = card_to_dict(completed)
    # The Java client reads these, and refuses a card whose additionalInterfaces lack its transport.
    assert fields["url"] == HTTP
    assert fields["preferredTransport"] == "JSONRPC"
    assert fields["protocolVersion"].startswith("0.3")
    assert fields["additionalInterfaces"] == [{"transport": "RocketMQ", "url": MQ}]
    assert fields["capabilities"]["streaming"] is True
    assert parse_card(fields) == completed
    assert choose(parse_card(fields), allow_jsonrpc=True) == Choice(binding="RocketMQ", url=MQ, version="1.0")
    # A reader of 0.3 sees the same with the 1.0 part taken away.
    old = parse_card({name: value for name, value in fields.items() if name != "supportedInterfaces"})
    assert choose(old, allow_jsonrpc=True) == Choice(binding="RocketMQ", url=MQ, version="0.3")


def test_completing_changes_nothing_twice_and_leaves_its_argument():
    original = parse_card(OLD_FORM)
    before = parse_card(original)
    once = complete_card(original, jsonrpc_url=HTTP)
    assert original == before
    assert complete_card(once, jsonrpc_url=HTTP) == once


def test_foreign_interfaces_tenants_and_every_address_are_kept():
    other = "http://mq:1/ns/Other"
    original = card(("GRPC", "grpc://a", "1.0"), ("JSONRPC", "http://template/", "1.0"), ("RocketMQ", MQ, "1.0"))
    original.supported_interfaces.append(
        AgentInterface(url=other, protocol_binding="RocketMQ", protocol_version="0.3", tenant="blue")
    )
    original.supported_interfaces[1].tenant = "red"
    completed = complete_card(original, jsonrpc_url=HTTP)
    assert [(e.protocol_binding, e.url, e.tenant, e.protocol_version) for e in completed.supported_interfaces] == [
        ("JSONRPC", HTTP, "red", "1.0"),
        ("RocketMQ", MQ, "", "1.0"),
        ("RocketMQ", other, "blue", "1.0"),
        ("JSONRPC", HTTP, "red", "0.3"),
        ("RocketMQ", MQ, "", "0.3"),
        ("RocketMQ", other, "blue", "0.3"),
        ("GRPC", "grpc://a", "", "1.0"),
    ]


def test_a_signature_goes_when_the_card_changes():
    complete = complete_card(card(("RocketMQ", MQ, "1.0")), jsonrpc_url=HTTP)
    complete.signatures.append(AgentCardSignature(protected="p", signature="s"))
    assert len(complete_card(complete, jsonrpc_url=HTTP).signatures) == 1
    assert len(complete_card(complete, jsonrpc_url="http://elsewhere/").signatures) == 0


def test_a_card_with_a_malformed_address_is_not_completed():
    with pytest.raises(CardError):
        complete_card(card(("RocketMQ", "http://mq:1/T", "1.0")), jsonrpc_url=HTTP)
