"""What can be set on the embedded broker, with the defaults of Apache RocketMQ 5.5.0 wherever it has one."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits and habits of one embedded broker. Times are in seconds, sizes in bytes.

    Attributes:
        strict: Topics and groups must have been created; otherwise their first use makes them.
        fsync: With a data folder, an acknowledged send or ack is on the disk. False leaves that to the operating
            system: it survives the death of this process, not that of the machine.
        retention: Age at which messages are deleted, consumed or not.
        max_body_bytes: Largest body of a message.
        max_lite_topic_length: Longest name of a LiteTopic, in characters.
        max_lite_topics: LiteTopics that may exist at a time.
        max_topics: Topics that may exist at a time, and as many groups.
        lite_quota: LiteTopics that one client may subscribe, for groups made by their first use.
        queues: Queues of a topic made by its first use; the levels of a PRIORITY topic.
        min_invisible: Shortest time for which a receive may hide messages from the others.
        max_invisible: Longest such time.
        auto_renew_invisible: That time where the client leaves it to the broker to renew.
        auto_renew_most: How long the broker goes on renewing for a client that neither acks nor disconnects.
        min_long_poll: Shorter long polls are made this long.
        max_long_poll: Longer ones are cut to this.
        max_attempts: Deliveries of a message after which it goes to the group's dead letter topic.
        max_properties: User properties of a message.
        max_properties_bytes: Size of all of them, tag and keys included.
        cache_bytes: Messages kept in memory for the readers that keep up.
        max_unwritten_bytes: Messages taken and not written yet, beyond which sends are told to slow down.
    """

    strict: bool = False
    fsync: bool = True
    retention: float = 72 * 3600.0
    max_body_bytes: int = 4 * MIB
    max_lite_topic_length: int = 64
    max_lite_topics: int = 1_000_000
    max_topics: int = 100_000
    lite_quota: int = 20_000
    queues: int = 8
    min_invisible: float = 10.0
    max_invisible: float = 12 * 3600.0
    auto_renew_invisible: float = 60.0
    auto_renew_most: float = 3 * 3600.0
    min_long_poll: float = 5.0
    max_long_poll: float = 20.0
    max_attempts: int = 17
    max_properties: int = 128
    max_properties_bytes: int = 16 * 1024
    cache_bytes: int = 16 * MIB
    max_unwritten_bytes: int = 64 * MIB
