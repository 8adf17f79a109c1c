"""A provider's Batch API: each call with patience, and none that could create a batch twice."""

import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai
from openai.types import Batch

from align.errors import JudgeError
from align.judge.asker import Asker
from align.judge.endpoint import DOWN, GARBLED, LIMITED, STOP, Reply
from align.judge.schedule import full_jitter
from align.judge.shards import URL

T = TypeVar("T")
ENDED = ("completed", "expired", "cancelled", "failed")
ABSENT = (404, 405, 501)  # what servers say to paths that they do not have
FULL = ("enqueued", "token limit", "token_limit")
LABEL = "align_shard"
CLOCKS_DIFFER_S = 86_400.0
FILE_S = 600.0  # without a byte, of a file of 190 MB


class Refused(JudgeError):
    """The provider will not do it."""

    def __init__(self, line: str, reply: Reply) -> None:
        super().__init__(line)
        self.reply = reply


class Full(Exception):
    """The provider has as many tokens waiting as it takes from this account."""


class Unsure(Exception):
    """The answer was lost: what was asked for may have been done."""


def full(text: str) -> bool:
    return any(words in text.lower() for words in FULL)


def starved(batch: Batch) -> bool:
    """It failed before it began, for too many tokens waiting."""
    errors = (batch.errors.data if batch.errors else None) or []
    return batch.status == "failed" and any(full(f"{e.code} {e.message}") for e in errors)


def checked(found: Any) -> Batch:
    """
    Raises:
        ValueError: the provider sent something else, with status 200.
    """
    if not isinstance(found, Batch) or not isinstance(found.id, str) or not found.status:
        raise ValueError(f"no batch, but {str(found)[:80]!r}")
    return found


class BatchApi:
    """Example: `batch = await BatchApi(asker).retrieve(id)`.

    Args:
        pause: sleeps for so many seconds, or raises where the run is to stop.
    """

    def __init__(self, asker: Asker, pause: Callable[[float], Awaitable[None]]) -> None:
        self.asker, self.pause = asker, pause
        self.endpoint = asker.endpoint
        self.client = asker.endpoint.client
        self.files = self.client.with_options(timeout=max(FILE_S, asker.settings.timeout_s)).files

    async def call(self, send: Callable[[], Awaitable[T]], *, repeat: bool = True) -> T:
        """What the provider answers, asked again while it is busy or down.

        Args:
            repeat: False for what must not be done twice.

        Raises:
            Refused: it says no, or has been down for `judge.give_up_after_s`.
            Full: too many tokens are waiting.
            Unsure: `repeat` is False and the answer was lost.
        """
        started = time.monotonic()
        for failures in itertools.count(1):
            try:
                return await send()
            except openai.APIStatusError as error:
                reply = self.endpoint.refused(error)
            except (openai.APIConnectionError, httpx2.HTTPError, TimeoutError) as error:
                reply = Reply(kind=DOWN, why=self.endpoint.told(error.__cause__ or error))
            except ValueError as error:
                reply = Reply(kind=GARBLED, why=self.endpoint.told(error))
            if reply.kind != STOP and reply.http in (400, 413, 429) and full(reply.why):
                raise Full(reply.why)
            if reply.kind not in (LIMITED, DOWN, GARBLED) or reply.http in ABSENT:
                raise Refused(self.line(reply), reply)
            if not repeat and reply.kind != LIMITED:
                raise Unsure(reply.why)
            if time.monotonic() - started > self.asker.settings.give_up_after_s:
                raise Refused(self.line(reply), reply)
            await self.pause(max(reply.wait or 0.0, full_jitter(failures, self.asker.rng)))
        raise AssertionError

    def line(self, reply: Reply) -> str:
        if reply.kind == STOP:
            return reply.why
        what = "does not answer" if reply.kind in (LIMITED, DOWN, GARBLED) else "refuses"
        return (
            f"judge.batch=true: the Batch API of {self.endpoint.url} {what} ({reply.why}); nothing "
            "is lost, type the same command again, or judge.batch=false to ask live"
        )

    def absent(self, error: Refused) -> JudgeError:
        """The same error, told as what it means for a path that every Batch API has."""
        if error.reply.http not in ABSENT:
            return error
        return JudgeError(
            f"judge.batch=true: {self.endpoint.url} has no Batch API; type judge.batch=false"
        )

    async def check(self) -> None:
        """
        Raises:
            JudgeError: there is no Batch API, or it refuses the key.
        """
        try:
            await self.call(lambda: self.client.batches.list(limit=1))
        except Refused as error:
            raise self.absent(error) from None

    async def upload(self, path: Path) -> str:
        """The id of the uploaded file. Twice does no harm."""

        async def send() -> str:
            with path.open("rb") as file:
                return (await self.files.create(file=(path.name, file), purpose="batch")).id

        try:
            return await self.call(send)
        except Refused as error:
            raise self.absent(error) from None

    async def create(self, shard: str, *, file: str, since: float) -> Batch:
        """A batch of an uploaded file. Where the answer is lost, the provider's list tells whether
        there is one.
        """
        started = time.monotonic()

        async def send() -> Batch:
            return checked(
                await self.client.batches.create(
                    input_file_id=file, endpoint=URL, completion_window="24h",
                    metadata={LABEL: shard},
                )
            )  # fmt: skip

        for failures in itertools.count(1):
            try:
                return await self.call(send, repeat=False)
            except Unsure as error:
                await self.pause(full_jitter(failures, self.asker.rng))
                try:
                    found = await self.find(shard, since=since)
                except JudgeError as unknown:  # whether there is a batch, nobody can say yet
                    raise Refused(str(unknown), Reply(kind=DOWN, why=str(unknown))) from None
                if found is not None:
                    return found
                if time.monotonic() - started > self.asker.settings.give_up_after_s:
                    reply = Reply(kind=DOWN, why=str(error))
                    raise Refused(self.line(reply), reply) from None
        raise AssertionError

    async def find(self, shard: str, *, since: float) -> Batch | None:
        """The batch of a shard among the provider's, newest first.

        Args:
            since: the shard's age; older batches are not looked at.
        """

        async def search() -> Batch | None:
            async for batch in self.client.batches.list(limit=100):
                if (batch.created_at or since) < since - CLOCKS_DIFFER_S:
                    return None
                if (batch.metadata or {}).get(LABEL) == shard and not starved(batch):
                    return checked(batch)
            return None

        try:
            return await self.call(search)
        except Refused as error:
            raise self.absent(error) from None

    async def retrieve(self, id: str) -> Batch:
        async def send() -> Batch:
            return checked(await self.client.batches.retrieve(id))

        return await self.call(send)

    async def download(self, file: str, path: Path) -> None:
        """A file's content to the disk, piece by piece."""

        async def send() -> None:
            async with self.files.with_streaming_response.content(file) as response:
                with path.open("wb") as out:
                    async for piece in response.iter_bytes(1 << 16):
                        out.write(piece)

        await self.call(send)
