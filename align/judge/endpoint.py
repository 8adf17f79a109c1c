"""One request to an OpenAI-compatible endpoint, and what came of it in words that the scheduler
knows.

The SDK is used for its wire format alone: no retries (the one retry layer keeps a ledger), no
redirects (prompts would travel to a host that nobody named), raw bytes (a paid answer is stored
before anybody tries to understand it).
"""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from align.errors import ConfigError, JudgeError
from align.judge.answers import completion
from align.judge.schedule import retry_after
from align.unseen import UNSEEN

if TYPE_CHECKING:
    from openai import AsyncOpenAI

OPENAI = "https://api.openai.com/v1"
LOCAL = ("localhost", "127.0.0.1", "::1")
# Connections of one pool: at each request a pool looks at all of its idle ones, so many small pools
# cost less than one for hundreds of connections.
POOL = 8
LONGEST_WHY = 300  # characters of what a server says, shown to people
SHORTEST_KEY = 8  # a shorter word is no secret, and striking it out would garble answers
# How endpoints say that a request is longer than the model's window.
OVERFLOW = (
    "context_length_exceeded", "maximum context length", "context length", "context window",
    "too many tokens", "prompt is too long", "exceed_context_size", "max_model_len",
    "context size", "`inputs` tokens",
)  # fmt: skip

# Kinds of replies.
ANSWERED, GARBLED, LIMITED, DOWN, UNREACHABLE, OVERFLOWED, FILTERED, REJECTED, STOP = (
    "answered", "garbled", "429", "down", "unreachable", "overflow", "filtered", "rejected", "stop",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of one request.

    Attributes:
        kind: answered (a chat completion, in `body`), garbled (200, yet none), 429, down (5xx, a
            time-out or a broken connection: perhaps billed), unreachable (never sent), overflow,
            filtered (refused by a content filter), rejected (another 4xx) or stop (nothing that
            follows could work).
        raw: the bytes as they came, keys struck out.
        wait: seconds for which the endpoint asks to be left alone.
        why: one line for people.
    """

    kind: str
    raw: bytes = b""
    http: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    wait: float | None = None
    why: str = ""


def check_url(url: str) -> None:
    """
    Raises:
        ConfigError: it is no http(s) address, or holds a password or a query, which would end up in
            files.
    """
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        parts, port, host = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or " " in url or port == 0:
        raise ConfigError(
            "judge.base_url: what was given is no address that begins with http:// or https://; "
            "type judge.base_url=http://HOST:PORT/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "judge.base_url: holds a user, a password or a query, which would end up in files; put "
            "the key into an environment variable and name that with judge.api_key_env=NAME"
        )


def find_key(base_url: str | None, api_key_env: str | None) -> str | None:
    """The key from the environment. OpenAI's own is only sent to OpenAI, unless it is named.

    Raises:
        JudgeError: the variable is not set.
    """
    openai = (base_url or OPENAI).rstrip("/") == OPENAI
    name = api_key_env or ("OPENAI_API_KEY" if openai else None)
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise JudgeError(
            f"no key in the environment variable {name}; type export {name}=…, or name another "
            "one with judge.api_key_env=NAME"
        )
    if not key.isascii() or not key.isprintable():
        raise JudgeError(
            f"the key in {name} holds characters that no header can carry; set it anew"
        )
    return key


ACCOUNT = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS")


async def without_account(request: Any) -> None:
    """Takes out what the SDK adds from the environment for OpenAI alone: other hosts must not learn
    of it.
    """
    custom = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
    for name in ("OpenAI-Organization", "OpenAI-Project", *(line.split(":")[0] for line in custom)):
        request.headers.pop(name.strip(), None)


class Endpoint:
    """A client for one address. Example: `reply = await endpoint.chat(body)`."""

    def __init__(
        self, base_url: str | None, *, api_key_env: str | None, timeout_s: float, connections: int
    ) -> None:
        import httpx2
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self.url = (base_url or OPENAI).rstrip("/")
        self.key = find_key(base_url, api_key_env)
        self.timeout_s = timeout_s

        certificates = httpx2.create_ssl_context()

        def client() -> AsyncOpenAI:
            limits = httpx2.Limits(max_connections=POOL, max_keepalive_connections=POOL)
            told = any(name in os.environ for name in ACCOUNT)
            hooks = {"request": [without_account] if told and self.url != OPENAI else []}
            return AsyncOpenAI(
                api_key=self.key or "none",
                base_url=self.url,
                max_retries=0,
                timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
                http_client=DefaultAsyncHttpxClient(
                    follow_redirects=False, limits=limits, verify=certificates, event_hooks=hooks
                ),
            )

        self.clients = [client() for _ in range(-(-connections // POOL))]
        # A stack with a place for each connection: the one used last is used next.
        self.free = [client for client in self.clients for _ in range(POOL)]

    @property
    def client(self) -> "AsyncOpenAI":
        """For all that is not a chat completion."""
        return self.clients[0]

    async def close(self) -> None:
        for client in self.clients:
            await client.close()

    def warning(self) -> str | None:
        """A key that would travel in clear."""
        host = urlsplit(self.url)
        if self.key and host.scheme == "http" and host.hostname not in LOCAL:
            return f"judge.base_url={self.url}: the key travels unencrypted; use https"
        return None

    def clean(self, raw: bytes) -> bytes:
        """Without the key, should the endpoint echo it."""
        if self.key is None or len(self.key) < SHORTEST_KEY:
            return raw
        spelled = json.dumps(self.key)[1:-1]
        return raw.replace(self.key.encode(), b"[key]").replace(spelled.encode(), b"[key]")

    def told(self, error: object) -> str:
        """An error in one line, without the key."""
        clean = self.clean(str(error).encode("utf-8", "replace")).decode("utf-8", "replace")
        line = UNSEEN.sub("", " ".join(clean.split()))
        return line[:LONGEST_WHY]

    async def chat(self, body: Mapping[str, Any]) -> Reply:
        """Sends one chat completion; never raises for what the endpoint does."""
        import httpx2
        import openai

        client = self.free.pop()
        try:
            async with asyncio.timeout(self.timeout_s):  # of the whole, slow streams included
                # The typed method walks the whole body once more, a fifth of a request's time.
                response = await client.post(
                    "/chat/completions", cast_to=httpx2.Response, body=dict(body)
                )
        except openai.APIStatusError as error:
            return self.refused(error)
        except TimeoutError:
            return Reply(kind=DOWN, why=f"no answer within {self.timeout_s:g} s")
        except openai.APIConnectionError as error:  # a time-out of the SDK's is one too
            cause = error.__cause__
            never_sent = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")
            if isinstance(error, openai.APITimeoutError) and not never_sent:
                return Reply(kind=DOWN, why=f"no answer within {self.timeout_s:g} s")
            why = f"{self.url}: {self.told(cause or error)}"
            return Reply(kind=UNREACHABLE if never_sent else DOWN, why=why)
        finally:
            self.free.append(client)
        http = response
        raw = self.clean(http.content)
        found = completion(raw)
        if found is None:
            why = f"status {http.status_code}, but no chat completion: {raw[:80]!r}"
            return Reply(
                kind=GARBLED, raw=raw, http=http.status_code, headers=http.headers, why=why
            )
        return Reply(
            kind=ANSWERED, raw=raw, http=http.status_code, headers=http.headers, body=found
        )

    def refused(self, error: Any) -> Reply:
        """A reply with an error status."""
        response = error.response
        status, headers = response.status_code, response.headers
        raw = self.clean(response.content)
        code, why = str(error.code or ""), self.told(reason(error))

        def reply(kind: str, why: str = why) -> Reply:
            wait = retry_after(headers) if kind == LIMITED else None
            return Reply(kind=kind, raw=raw, http=status, headers=headers, wait=wait, why=why)

        if code == "content_filter":
            return reply(FILTERED)
        if 300 <= status < 400:
            to = self.told(headers.get("location", "elsewhere"))
            return reply(
                STOP,
                f"judge.base_url={self.url} redirects to {to}; prompts are not sent after it. "
                "Name the right address with judge.base_url=URL",
            )
        if status in (401, 403):
            return reply(
                STOP,
                f"{self.url} refuses the key ({status}: {why}); put the right one into the "
                "environment and name the variable with judge.api_key_env=NAME",
            )
        if status == 404:
            return reply(
                STOP, f"{self.url} does not know the model or the path ({why}); check judge.model "
                "and judge.base_url (it usually ends in /v1)"
            )  # fmt: skip
        if "insufficient_quota" in (code, str(error.type)) or status == 402:
            return reply(
                STOP,
                f"{self.url}: the account's quota is used up ({why}); nothing is lost, top it up "
                "and type the same command",
            )
        if status == 429:
            return reply(LIMITED)
        if status in (408, 409, 425) or status >= 500:
            return reply(DOWN)
        if (
            status == 413
            or code == "context_length_exceeded"
            or any(words in f"{error.type} {why}".lower() for words in OVERFLOW)
        ):
            return reply(OVERFLOWED)
        return reply(REJECTED)


def reason(error: Any) -> str:
    """What an error reply says is wrong, wherever its server puts that: error.message, a bare
    `error`, `detail` (FastAPI: transformers serve), or plain text. The SDK's own text has the first
    alone. What FastAPI echoes of the request is left out.
    """
    body = error.body  # of {"error": …} what stands in it
    if isinstance(body, Mapping):
        body = next((body[key] for key in ("message", "detail") if body.get(key)), None)
    if isinstance(body, list):
        said = [item.get("msg") if isinstance(item, Mapping) else item for item in body]
        body = "; ".join(str(each) for each in said if each)
    text = f"status {error.response.status_code}"
    return f"{text}: {body}" if body else text
