"""Who a caller is: bearer tokens, and the assertion by which a gateway tells an agent's server for whom it asks.

Both are JSON Web Tokens (HS256), signed with keys made from the deployment's secret, one for each purpose: a bearer
token is never good as an assertion. An assertion is good for one request, at one agent, with its answer in one place,
for a while: whoever reads it on the broker can have that request answered once more there, and nothing else. No I/O.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from typing import TYPE_CHECKING, Any

import jwt

from agentscope_rocketmq.errors import ConfigurationError, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ANONYMOUS",
    "CONTEXT_HEADER",
    "OWNER_HEADER",
    "TokenVerifier",
    "make_assertion",
    "make_token",
    "owner_name",
    "read_assertion",
]

ANONYMOUS = "anonymous"
"""The owner where nothing authenticates."""

OWNER_HEADER = "x-rocketmq-owner"
"""Header of a carried request: the owner for whom a gateway asks, as a signed assertion."""

CONTEXT_HEADER = "x-rocketmq-context-id"
"""Header of a carried request: A2A context id that its message gets where it names neither a context nor a task."""

_ALGORITHM = "HS256"
_LONGEST_OWNER = 256
_CLOCKS_APART = 30.0  # seconds by which the clocks of two machines may differ


def owner_name(value: object) -> str:
    """Check an owner's name, as a verifier gives it.

    Args:
        value: The name: 1-256 characters of text, not `anonymous`, which is nobody's name.

    Raises:
        ConfigurationError: It is not one.
    """
    is_name = isinstance(value, str) and 0 < len(value) <= _LONGEST_OWNER and value != ANONYMOUS and value.isprintable()
    if not is_name:
        raise ConfigurationError(
            f"{str(value)[:64]!r} is no owner's name: give 1-{_LONGEST_OWNER} printable characters, not {ANONYMOUS!r}."
        )
    return str(value)


def make_token(owner: str, *, secret: str, lifetime: float = 24 * 3600.0) -> str:
    """Make a bearer token for an owner.

    Args:
        owner: Name of the owner, 1-256 printable characters.
        secret: Secret of the deployment (`ROCKETMQ_A2A_SECRET`).
        lifetime: Seconds for which it is good.

    Raises:
        ConfigurationError: The name is none, or the lifetime is not above 0.
    """
    if not 0 < lifetime < math.inf:
        raise ConfigurationError(f"A token can't be good for {lifetime:g} s: give a number of seconds above 0.")
    now = time.time()
    claims = {"sub": owner_name(owner), "iat": int(now), "exp": now + lifetime}
    return jwt.encode(claims, _key(secret, "token"), algorithm=_ALGORITHM)


class TokenVerifier:
    """Verifies the bearer tokens of `make_token`: the gateway's own kind.

    Args:
        secret: Secret of the deployment.
    """

    def __init__(self, secret: str) -> None:
        self._key = _key(secret, "token")

    async def __call__(self, token: str) -> str:
        """The owner that a token names.

        Raises:
            Unauthenticated: It is forged, expired or no token.
        """
        return str(_subject(token, self._key, "The bearer token", required=("sub", "exp"))["sub"])


def make_assertion(
    owner: str,
    *,
    secret: str,
    audience: str,
    request_id: str,
    body: str,
    reply: str,
    lifetime: float,
) -> str:
    """Say to an agent's server for whom a request is made.

    Args:
        owner: Name of the owner.
        secret: Secret of the deployment, the same on both sides.
        audience: Topic of the agent.
        request_id: Id of the request envelope.
        body: The JSON-RPC request.
        reply: Where the answer goes: reply topic and LiteTopic.
        lifetime: Seconds for which it is good; a request may wait on the broker for that long.
    """
    claims = {
        "sub": owner_name(owner),
        "aud": audience,
        "jti": request_id,
        "body": _digest(body),
        "reply": reply,
        "exp": time.time() + lifetime,
    }
    return jwt.encode(claims, _key(secret, "assertion"), algorithm=_ALGORITHM)


def read_assertion(
    assertion: str, *, secret: str, audiences: Iterable[str], request_id: str, body_sha256: str, reply: str
) -> str:
    """The owner that an assertion names.

    Args:
        assertion: The header's value.
        secret: Secret of the deployment.
        audiences: Topics of the agent that reads it.
        request_id: Id of the request envelope that it came in.
        body_sha256: SHA-256 of the JSON-RPC request that it came with, in hexadecimal.
        reply: Where the answer is to go.

    Raises:
        Unauthenticated: It is forged, expired, or was made for another request, agent or place of the answer.
    """
    claims = _subject(
        assertion,
        _key(secret, "assertion"),
        "The owner assertion",
        required=("sub", "aud", "exp", "jti", "body", "reply"),
        audience=list(audiences),
    )
    if (claims["jti"], claims["body"], claims["reply"]) != (request_id, body_sha256, reply):
        raise Unauthenticated("The owner assertion was made for another request. Ask again through a gateway.")
    return str(claims["sub"])


def _subject(text: str, key: bytes, what: str, *, required: Iterable[str], **options: Any) -> dict[str, Any]:
    try:
        claims: dict[str, Any] = jwt.decode(
            text,
            key,
            algorithms=[_ALGORITHM],
            leeway=_CLOCKS_APART,
            options={"require": list(required)},
            **options,
        )
        owner_name(claims["sub"])
    except jwt.ExpiredSignatureError:
        raise Unauthenticated(f"{what} has expired: get a new one.") from None
    except jwt.InvalidAudienceError:
        raise Unauthenticated(f"{what} was made for another agent.") from None
    except (jwt.PyJWTError, ConfigurationError, ValueError):
        # What exactly is wrong with a forged one is nobody's business.
        raise Unauthenticated(f"{what} is not valid: it is malformed, or was signed with another secret.") from None
    return claims


def _key(secret: str, purpose: str) -> bytes:
    return hmac.new(secret.encode(), f"agentscope-rocketmq {purpose}".encode(), hashlib.sha256).digest()


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
