"""Hypothesis strategies and small builders that the tests of the wire share."""

from __future__ import annotations

import json

from hypothesis import strategies as st


def chunked(data: bytes) -> st.SearchStrategy[list[bytes]]:
    """Every way to cut bytes into chunks."""
    return st.lists(st.integers(0, len(data)), max_size=12).map(
        lambda cuts: [data[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True)]
    )


def chunk_event(text: str) -> str:
    """A 1.0 artifact update."""
    return result_event({"artifactUpdate": {"artifact": {"artifactId": "a", "parts": [{"text": text}]}}})


def status_event(state: str) -> str:
    """A 1.0 status update."""
    return result_event({"statusUpdate": {"taskId": "t", "status": {"state": f"TASK_STATE_{state}"}}})


def result_event(result: object) -> str:
    """A JSON-RPC response."""
    return json.dumps({"jsonrpc": "2.0", "id": "1", "result": result}, ensure_ascii=False)
