"""The order of clips in training."""

import math
import random
from collections.abc import Collection, Sequence
from typing import TypeVar

from crepa_cli.data.shares import Share

T = TypeVar("T")


class BatchOrder:
    """The clips of batch number `index`, as a pure function of the seed and that number.

    There is no state from batch to batch, so a resumed run continues exactly where it stopped. Batches are numbered
    over all epochs; with several processes, the caller splits the numbers among them.

    `buckets` are lists of clip indices; a batch never mixes buckets and is always complete. An epoch is the shortest
    stretch of such batches in which every clip is visited as often as its share says: so many times if the batch size
    divides the visits of every bucket, and otherwise up to `batch_size` times as often. A single clip in a bucket of
    its own, at batch size 4, thus fills one batch in an epoch in which every other clip is visited 4 times too.

    `shares` are the clips of each source with their visits; without them, each clip has `repeats`.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]],
        *,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        shares: Sequence[Share] = (),
    ) -> None:
        shares = shares or [Share({clip for bucket in buckets for clip in bucket}, repeats)]
        self._buckets = [_parts(bucket, shares) for bucket in buckets if bucket]
        if not self._buckets:
            raise ValueError("there are no clips to train on")
        self._batch_size = batch_size
        self._seed = seed
        visits = [sum(len(part.clips) * part.visits for part in parts) for parts in self._buckets]
        self._rounds = math.lcm(*(batch_size // math.gcd(batch_size, count) for count in visits))
        self._latest: tuple[int, list[list[int]]] = (-1, [])
        self.batches_per_epoch = sum(count * self._rounds // batch_size for count in visits)

    def epoch(self, index: int) -> int:
        """The epoch, counted from 0, that batch number `index` belongs to."""
        return index // self.batches_per_epoch

    def batch(self, index: int) -> list[int]:
        """The `batch_size` clip indices of batch number `index`, counted from 0 over all epochs."""
        epoch, position = divmod(index, self.batches_per_epoch)
        if self._latest[0] != epoch:
            self._latest = (epoch, self._epoch_batches(epoch))
        return list(self._latest[1][position])

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        randomness = random.Random(f"{self._seed}/{epoch}")
        size = self._batch_size
        batches: list[tuple[float, list[int]]] = []
        for parts in self._buckets:
            visits = self._visits(parts, randomness)
            # One random place in each of the bucket's equal parts of the epoch: its batches stay in order and spread
            # out, so that the shares are nearly right in a run that ends within an epoch.
            count = len(visits) // size
            batches.extend(
                ((number + randomness.random()) / count, visits[number * size : (number + 1) * size])
                for number in range(count)
            )
        return [batch for _, batch in sorted(batches)]

    def _visits(self, parts: Sequence[Share], randomness: random.Random) -> list[int]:
        """The clips of a bucket in the order of an epoch, in which those of each part are evenly spread."""
        orders = [
            [clip for _ in range(self._rounds * part.visits) for clip in _shuffled(part.clips, randomness)]
            for part in parts
        ]
        if len(orders) == 1:
            return orders[0]
        places = [
            ((number + randomness.random()) / len(order), clip) for order in orders for number, clip in enumerate(order)
        ]
        return [clip for _, clip in sorted(places)]


def _parts(bucket: Sequence[int], shares: Sequence[Share]) -> list[Share]:
    """The clips of a bucket by share."""
    parts = [Share([clip for clip in bucket if clip in share.clips], share.visits) for share in shares]
    return [part for part in parts if part.clips]


def _shuffled(items: Collection[T], randomness: random.Random) -> list[T]:
    # Python guarantees the same values of random() in every version, but not the same order from shuffle().
    return sorted(items, key=lambda _: randomness.random())
