"""Pictures of many in one batch: how many, how long it waits, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from headstart.ship.batching import Batcher


class Sums:
    """Says the sum of the pixels; keeps what it was given, and waits at a gate."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, pixels: np.ndarray) -> list[int]:
        assert self.gate.wait(5)
        found = [int(each.sum()) for each in pixels]
        self.batches.append(found)
        if 13 in found:
            raise RuntimeError("thirteen")
        return found


def pixel(value: int) -> np.ndarray:
    return np.full((1, 1, 1), value, dtype=np.uint8)


def with_batcher(test: Callable[[Batcher[int], Sums], Awaitable[None]], **given: Any) -> Sums:
    sums = Sums()

    async def run() -> None:
        batcher = Batcher(sums, **given)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher, sums), 10)
        finally:
            sums.gate.set()
            await batcher.stop()

    asyncio.run(run())
    return sums


def test_each_gets_its_own_answer_and_no_batch_is_too_large() -> None:
    async def test(batcher: Batcher[int], sums: Sums) -> None:
        assert await asyncio.gather(*[batcher.ask(pixel(i)) for i in range(50, 75)]) == list(range(50, 75))

    told: list[int] = []
    sums = with_batcher(test, most=8, told=lambda size, seconds: told.append(size))
    assert told == [8, 8, 8, 1] == [len(batch) for batch in sums.batches]


def test_while_the_network_is_busy_the_next_batch_fills() -> None:
    async def test(batcher: Batcher[int], sums: Sums) -> None:
        sums.gate.clear()
        first = batcher.ask(pixel(1))
        await asyncio.sleep(0.05)
        others = [batcher.ask(pixel(i)) for i in (2, 3, 4)]
        await asyncio.sleep(0.05)
        assert batcher.waiting == 3 and batcher.stuck(0.01) and not batcher.stuck(5)
        sums.gate.set()
        assert await asyncio.gather(first, *others) == [1, 2, 3, 4]

    assert with_batcher(test).batches == [[1], [2, 3, 4]]


def test_it_waits_for_those_on_their_way_and_not_for_ever() -> None:
    async def test(batcher: Batcher[int], sums: Sums) -> None:
        async def late() -> int:
            with batcher.coming():
                await asyncio.sleep(0.05)
                asked = batcher.ask(pixel(2))
            return await asked

        coming = asyncio.create_task(late())
        await asyncio.sleep(0)
        assert await asyncio.gather(batcher.ask(pixel(1)), coming) == [1, 2]
        began = time.monotonic()
        with batcher.coming():  # it does not come
            assert await batcher.ask(pixel(3)) == 3
        assert 0.9 < time.monotonic() - began < 6
        began = time.monotonic()
        assert await batcher.ask(pixel(4)) == 4
        assert time.monotonic() - began < 0.9, "nobody is on the way: no waiting"

    assert with_batcher(test, patience=1.0).batches == [[1, 2], [3], [4]]


def test_one_that_gives_up_on_the_way_holds_nobody_up() -> None:
    async def test(batcher: Batcher[int], sums: Sums) -> None:
        async def unreadable() -> None:
            with pytest.raises(ValueError), batcher.coming():
                await asyncio.sleep(0.05)
                raise ValueError

        giving_up = asyncio.create_task(unreadable())
        await asyncio.sleep(0)
        began = time.monotonic()
        assert await batcher.ask(pixel(1)) == 1
        assert time.monotonic() - began < 2
        await giving_up

    with_batcher(test, patience=5.0)


def test_who_has_left_is_not_looked_at() -> None:
    async def test(batcher: Batcher[int], sums: Sums) -> None:
        sums.gate.clear()
        first = batcher.ask(pixel(1))
        await asyncio.sleep(0.05)
        gone, stays = batcher.ask(pixel(2)), batcher.ask(pixel(3))
        gone.cancel()
        first.cancel()  # its batch is under way
        sums.gate.set()
        assert await stays == 3

    assert with_batcher(test).batches == [[1], [3]]


def test_a_network_that_fails_fails_for_its_batch_only() -> None:
    async def test(batcher: Batcher[int], sums: Sums) -> None:
        for failed in await asyncio.gather(
            *[batcher.ask(pixel(i)) for i in (12, 13)], return_exceptions=True
        ):
            assert isinstance(failed, RuntimeError)
        assert await batcher.ask(pixel(14)) == 14 and not batcher.stuck(5)

    with_batcher(test)


def test_stopping_leaves_nobody_waiting() -> None:
    async def test(batcher: Batcher[int], sums: Sums) -> None:
        sums.gate.clear()
        first = batcher.ask(pixel(1))
        await asyncio.sleep(0.05)
        second = batcher.ask(pixel(2))
        threading.Timer(0.1, sums.gate.set).start()
        await batcher.stop()
        assert second.cancelled() and batcher.stuck(5)
        first.cancel()

    with_batcher(test)
