"""Sees shards through: each is submitted once, waited for, and taken in, by one process."""

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from openai.types import Batch

from align.errors import JudgeError
from align.judge import shards
from align.judge.asker import Asker
from align.judge.batch_api import ENDED, BatchApi, Full, Refused, starved
from align.judge.endpoint import DOWN, GARBLED
from align.judge.entries import CREATING, SUBMITTED, TAKEN, WRITTEN
from align.judge.intake import take_in
from align.judge.shards import Row
from align.notice import notice


@dataclass
class Shard:
    """One batch on its way, as this process sees it.

    Attributes:
        fresh: written by this process, so that no other can have submitted it.
        lock: None while another process tends it.
        uploaded: the provider's name for its file.
    """

    owner: str
    place: Path
    number: str
    fresh: bool
    row: Row | None = None
    size: int = 0
    lock: IO[bytes] | None = None
    uploaded: str | None = None
    told: str = ""
    done: bool = False

    @property
    def path(self) -> Path:
        assert self.row is not None
        return self.place / self.row.shard

    @property
    def running(self) -> bool:
        """Whether the provider works on it, or another process sees to that."""
        return not self.done and (self.lock is None or bool(self.row and self.row.id))

    def tell(self, batch: Batch) -> None:
        """A line when the counts have changed."""
        counts = batch.request_counts
        done, total = (counts.completed + counts.failed, counts.total) if counts else (0, 0)
        line = f"batch {self.number} {batch.id}: {done:,}/{total or self.size:,} done"
        if line != self.told:
            notice(f"{line} ({batch.status})")
        self.told = line


class Tending:
    """Example: `await Tending(found.waiting, fresh=found.fresh, asker=asker, api=api).tend()`.

    Attributes:
        again: how many requests another batch may answer; `answered`: how many one did.
    """

    def __init__(
        self, owners: Iterable[str], *, fresh: Container[str], asker: Asker, api: BatchApi
    ) -> None:
        self.asker, self.api, self.ledger = asker, api, asker.ledger
        self.place, names = shards.folder(asker.ledger.path), list(owners)
        self.shards = [
            Shard(owner=owner, place=self.place, number=f"{n}/{len(names)}", fresh=owner in fresh)
            for n, owner in enumerate(names, start=1)
        ]
        self.full = False
        self.again = 0.0
        self.answered = 0

    async def tend(self) -> None:
        """Submits the shards and takes in what comes back.

        Raises:
            Full: the provider has no room for shards so large; they were withdrawn.
        """
        try:
            while not all(shard.done for shard in self.shards):
                for shard in self.shards:
                    if not shard.done and shard.lock is None:
                        self.hold(shard)
                await self.submit_all()
                for shard in self.shards:
                    if shard.lock is not None and shard.running:
                        await self.look_at(shard)
                if not all(shard.done for shard in self.shards):
                    await self.api.pause(self.asker.settings.batch_poll_s)
        finally:
            await self.leave()

    async def withdraw(self) -> None:
        """Lets those of this process go that were never submitted."""
        for shard in self.shards:
            if shard.fresh:
                self.hold(shard)
        await self.leave()

    def hold(self, shard: Shard) -> None:
        """Takes hold of a shard, unless another process has it."""
        row = shards.row(self.ledger, shard.owner)
        if row is not None and row.status != TAKEN:
            shard.row = row
            self.refuse_other(row)
            shard.lock = shards.lock(shard.path)
            if shard.lock is None:
                return
            row = shard.row = shards.row(self.ledger, shard.owner)  # as its last holder left it
        if row is None or row.status == TAKEN:
            shard.done = True
            self.again = float("inf")  # how many of its requests are left, the next look will tell
        else:
            shard.size = shards.opened(self.ledger, shard.owner)

    def refuse_other(self, row: Row) -> None:
        """
        Raises:
            JudgeError: the batch is at another endpoint.
        """
        if row.endpoint != self.asker.endpoint.url:
            raise JudgeError(
                f"judge.base_url={self.asker.endpoint.url}: some of the questions are in a batch "
                f"at {row.endpoint}; type judge.base_url={row.endpoint} to take it in"
            )

    async def submit_all(self) -> None:
        """
        Raises:
            Full: the provider takes none, though none of ours is under way.
        """
        for shard in self.shards:
            if shard.done or shard.running or (self.full and self.running):
                continue
            await self.api.pause(0)
            try:
                await self.submit(shard)
            except Full:
                self.full = True
                if not self.running:
                    raise

    async def submit(self, shard: Shard) -> None:
        """Makes the shard a batch, or finds the batch that a killed process made of it."""
        row = shard.row
        assert row is not None
        batch = None
        if not shard.fresh or row.status != WRITTEN:
            batch = await self.api.find(row.shard, since=row.created)
        if batch is None and not shard.path.stat().st_size:
            await self.give_up(shard)
            return
        batch = batch or await self.create(shard, row)
        await self.mark(shard, status=SUBMITTED, id=batch.id)

    async def create(self, shard: Shard, row: Row) -> Batch:
        shard.uploaded = shard.uploaded or await self.api.upload(shard.path)
        await self.mark(shard, status=CREATING)
        try:
            batch = await self.api.create(row.shard, file=shard.uploaded, since=row.created)
        except Full:
            await self.mark(shard, status=WRITTEN)
            raise
        except Refused as error:
            if error.reply.kind not in (DOWN, GARBLED):  # then there may be one
                await self.mark(shard, status=WRITTEN)
            raise
        self.asker.sent += shard.size
        return batch

    async def mark(self, shard: Shard, *, status: str, id: str | None = None) -> None:
        assert shard.row is not None
        shard.row = replace(shard.row, status=status, id=id)
        await self.ledger.run(partial(shards.mark, shard=shard.row.shard, status=status, id=id))

    async def look_at(self, shard: Shard) -> None:
        """Polls a batch, and takes it in when it has ended.

        Raises:
            Full: it ended for lack of room, with none of ours under way.
        """
        assert shard.row is not None and shard.row.id is not None
        try:
            batch = await self.api.retrieve(shard.row.id)
        except Refused as error:
            if error.reply.http != 404:
                raise
            await self.vanished(shard, shard.row)
            return
        shard.tell(batch)
        if batch.status not in ENDED:
            return
        if starved(batch):
            await self.mark(shard, status=WRITTEN)
            self.full = True
            if not self.running:
                raise Full("the enqueued token limit is reached")
            return
        counts = await take_in(
            self.api, self.asker, shard=shard.row.shard, batch=batch, path=shard.path
        )
        shard.done, self.full = True, False
        self.again += counts.again
        self.answered += counts.answered
        if batch.status == "failed" and not counts.answered:
            raise self.failed(batch)

    def failed(self, batch: Batch) -> JudgeError:
        errors = (batch.errors.data if batch.errors else None) or []
        why = self.asker.endpoint.told("; ".join(str(e.message) for e in errors[:3]) or "no reason")
        return JudgeError(
            f"judge.batch=true: {self.asker.endpoint.url} failed batch {batch.id} ({why}); nothing "
            "was billed, mend that and type the same command, or judge.batch=false to ask live"
        )

    async def vanished(self, shard: Shard, row: Row) -> None:
        """A batch that the provider does not know.

        Raises:
            JudgeError: unless its file was deleted, which says that it is gone for good.
        """
        if not shard.path.stat().st_size:
            await self.give_up(shard)
            return
        raise JudgeError(
            f"judge.batch=true: {self.asker.endpoint.url} does not know batch {row.id}; "
            "use the key of the account that it was made with, or, if it is gone for good, delete "
            f"{shard.path}: its requests then count as possibly billed and are asked again"
        )

    async def give_up(self, shard: Shard) -> None:
        """Closes a shard that nobody can take in any more."""
        assert shard.row is not None
        identity = self.asker.settings.judge
        await self.ledger.run(
            partial(shards.close, shard=shard.row.shard, identity=identity, billed=True)
        )
        shards.forget(shard.path)
        shard.done = True
        self.again += shard.size

    @property
    def running(self) -> int:
        """Batches that are under way."""
        return sum(shard.running for shard in self.shards)

    @property
    def largest(self) -> int:
        """Requests of the largest shard that was submitted in vain."""
        return max(shard.size for shard in self.shards if not shard.done and not shard.running)

    async def leave(self) -> None:
        """Lets go of the shards; those that were never submitted are as if never written."""
        for shard in self.shards:
            if shard.lock is None:
                continue
            if not shard.done and shard.row is not None and shard.row.status == WRITTEN:
                name, identity = shard.row.shard, self.asker.settings.judge
                await self.ledger.run(partial(shards.withdraw, shard=name, identity=identity))
            shard.lock.close()
        await self.ledger.run(partial(shards.sweep, place=self.place, owner=self.ledger.owner))
