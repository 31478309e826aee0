"""Pictures of many requests in one forward pass.

A network answers 16 pictures in less than 16 times the time of one. So pictures queue up, and the next batch
takes all that wait, up to a bound. A lone picture never waits for company that may not come: a batch is held
back, for a few milliseconds at most, only while other pictures are known to be on their way (being decoded).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np

Answer = TypeVar("Answer")


class Batcher(Generic[Answer]):
    """One thread with the network, and a queue in front of it. Belongs to the event loop it is started on.

    Args:
        judge: uint8 [B, S, S, 3] -> an answer per picture; called in one thread, never twice at once.
        most: pictures per batch.
        patience: seconds that a batch waits for pictures on their way.
        told: is given the size of each batch and the seconds it took.
    """

    def __init__(
        self,
        judge: Callable[[np.ndarray], list[Answer]],
        *,
        most: int = 16,
        patience: float = 0.002,
        told: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._judge, self._told = judge, told
        self.most, self.patience = most, patience
        self._waiting: deque[tuple[np.ndarray, asyncio.Future[Answer]]] = deque()
        self._coming = 0
        self._news = asyncio.Event()  # something arrived, or will not come after all
        self._since: float | None = None  # when the batch under way began
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer; to be called on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="batches")

    async def stop(self) -> None:
        """Answer nothing more; what still waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        self._thread.shutdown(wait=True)

    @property
    def waiting(self) -> int:
        """Pictures in the queue."""
        return len(self._waiting)

    def stuck(self, seconds: float) -> bool:
        """Whether the network has been at the same batch for longer than this, or answers no more."""
        alive = self._task is not None and not self._task.done()
        return not alive or (self._since is not None and time.monotonic() - self._since > seconds)

    @contextmanager
    def coming(self, pictures: int = 1) -> Iterator[None]:
        """Announce pictures that will be asked about, or given up, before the block ends."""
        self._coming += pictures
        try:
            yield
        finally:
            self._coming -= pictures
            self._news.set()

    def ask(self, pixels: np.ndarray) -> asyncio.Future[Answer]:
        """uint8 [S, S, 3] -> what the network will say of it; cancelled, it is not asked any more."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, future))
        self._news.set()
        return future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            self._since = time.monotonic()
            try:
                pixels = np.stack([each for each, _ in batch])
                answers = await loop.run_in_executor(self._thread, self._judge, pixels)
            except Exception as error:  # noqa: BLE001  # those who asked are told; the next batch may be well
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                self._told(len(batch), time.monotonic() - self._since)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
            self._since = None

    async def _gather(self) -> list[tuple[np.ndarray, asyncio.Future[Answer]]]:
        """All that wait, at least one and at most `most`."""
        deadline: float | None = None
        while True:
            self._forget()
            now = time.monotonic()
            if self._waiting:
                deadline = now + self.patience if deadline is None else deadline
                if len(self._waiting) >= self.most or not self._coming or now >= deadline:
                    return [self._waiting.popleft() for _ in range(min(self.most, len(self._waiting)))]
            self._news.clear()
            timeout = None if not self._waiting or deadline is None else deadline - now
            try:
                await asyncio.wait_for(self._news.wait(), timeout)
            except TimeoutError:
                continue

    def _forget(self) -> None:
        """Drop pictures whose asker has gone."""
        if any(future.done() for _, future in self._waiting):
            self._waiting = deque(each for each in self._waiting if not each[1].done())
