"""The order of clips in training."""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class BatchOrder:
    """The clips of batch number `index`, as a pure function of the seed and that number.

    There is no state from batch to batch, so a resumed run continues exactly where it stopped. Batches are numbered
    over all epochs; with several processes, the caller splits the numbers among them.

    `buckets` are lists of clip indices; a batch never mixes buckets and is always complete. An epoch is the shortest
    stretch of such batches in which every clip is visited equally often: `repeats` times if the batch size divides the
    visits of every bucket, and otherwise up to `batch_size` times as often. A single clip in a bucket of its own, at
    batch size 4, thus fills one batch in an epoch in which every other clip is visited 4 times too.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], *, batch_size: int, seed: int, repeats: int = 1) -> None:
        self._buckets = [list(bucket) for bucket in buckets if bucket]
        if not self._buckets:
            raise ValueError("there are no clips to train on")
        self._batch_size = batch_size
        self._seed = seed
        rounds = math.lcm(*(batch_size // math.gcd(batch_size, len(bucket) * repeats) for bucket in self._buckets))
        self._visits = rounds * repeats
        self._latest: tuple[int, list[list[int]]] = (-1, [])
        self.batches_per_epoch = sum(len(bucket) * self._visits // batch_size for bucket in self._buckets)

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
        for bucket in self._buckets:
            visits = [clip for _ in range(self._visits) for clip in _shuffled(bucket, randomness)]
            # One random place in each of the bucket's equal parts of the epoch: its batches stay in order and spread
            # out, so that the shares are nearly right in a run that ends within an epoch.
            count = len(visits) // size
            batches.extend(
                ((number + randomness.random()) / count, visits[number * size : (number + 1) * size])
                for number in range(count)
            )
        return [batch for _, batch in sorted(batches)]


def _shuffled(items: Sequence[T], randomness: random.Random) -> list[T]:
    # Python guarantees the same values of random() in every version, but not the same order from shuffle().
    return sorted(items, key=lambda _: randomness.random())
