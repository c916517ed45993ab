"""An asyncio client of Apache RocketMQ 5's gRPC protocol, on the official generated stubs.

::

    protocol    the generated stubs, loaded without the official client's import side effects
    lifecycle   how objects are closed, and the event loop they live in
    status      answer codes and gRPC failures -> the typed errors of `agentscope_rocketmq.errors`
    connection  channels to the proxies of one cluster, signing, TLS, fail-over between endpoints
    client      one client id at a proxy: telemetry stream, settings, heartbeats, re-establishment
    message     what goes out and what comes in
    producer    sends, with flow control and outages waited out up to a deadline
    polling     several staggered long polls, never cancelled
    consumer    a consumer group's share of a NORMAL topic, one lease for each message
    litetopic   what a reader knows of one LiteTopic: where to begin, what came, what is missing
    lite        LiteTopics: subscribe, seek, ordered batches, acks, take-over
    admin       topics and groups, over the remoting protocol

Why not the official high-level classes: docs/rocketmq-client.md.
"""
