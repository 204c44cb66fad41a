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

    `buckets` are lists of clip indices; a batch never mixes buckets. Each epoch visits every clip `repeats` times. The
    last batch of a bucket is filled up with other clips of the bucket, so that every batch is complete.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], *, batch_size: int, seed: int, repeats: int = 1) -> None:
        self._buckets = [list(bucket) for bucket in buckets if bucket]
        if not self._buckets:
            raise ValueError("there are no clips to train on")
        self._batch_size = batch_size
        self._seed = seed
        self._repeats = repeats
        self._latest: tuple[int, list[list[int]]] = (-1, [])
        self.batches_per_epoch = sum(math.ceil(len(bucket) * repeats / batch_size) for bucket in self._buckets)

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
        batches: list[list[int]] = []
        for bucket in self._buckets:
            visits = [clip for _ in range(self._repeats) for clip in _shuffled(bucket, randomness)]
            batches.extend(
                [visits[i % len(visits)] for i in range(start, start + self._batch_size)]
                for start in range(0, len(visits), self._batch_size)
            )
        return _shuffled(batches, randomness)


def _shuffled(items: Sequence[T], randomness: random.Random) -> list[T]:
    # Python guarantees that random() gives the same numbers in every version, but not that shuffle() does.
    return sorted(items, key=lambda _: randomness.random())
