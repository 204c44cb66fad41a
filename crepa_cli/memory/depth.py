"""The memory of a deep transformer, extended from that of a shallow one: the same happens in block after block.

A few blocks are run: the first, the last, those whose hidden states are aligned and their successors, and one that
stands for all others: one for each kind of block, and one each for blocks that keep their activations and for those
that do not. Another run without that one shows what everything outside the blocks, such as the optimizer, takes for
each block. The result is exact, as far as blocks do the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crepa_cli.memory.live_bytes import READ_DEVICE, LiveBytes, Segment
from crepa_cli.models.family import Family
from crepa_cli.profile import Profile
from crepa_cli.profile.table import Table

Bytes = Counter[str]
FORWARD, BACKWARD = "forward", "backward"


class Part(NamedTuple):
    """A part of a step: the forward or backward pass of a block, or what is done outside of the blocks."""

    name: str
    block: int | None = None
    call: int = 0


START, END = Part("start"), Part("end")
"""Before and after a step."""
Segments = dict[Part, Segment]


class Timeline:
    """The segments of a step, in order.

    Args:
        live: the counter of the step's tensors.
    """

    def __init__(self, live: LiveBytes) -> None:
        self.segments: Segments = {}
        self._live = live
        self._part = START

    def begin(self, part: Part) -> None:
        """End a segment and begin the next."""
        self.segments[self._part] = self._live.cut()
        self._part = part

    def watch(self, blocks: nn.ModuleList, name: str = FORWARD) -> None:
        """Begin a segment with the forward pass of each block, and with its backward pass."""
        for index, block in enumerate(blocks):
            self._watch(block, name, index, last=index + 1 == len(blocks))

    def _watch(self, block: nn.Module, name: str, index: int, *, last: bool) -> None:
        part = Part(name, index)

        def before(*_: Any) -> None:
            # Under activation checkpointing the backward pass calls it again.
            if part not in self.segments:
                self.begin(part)

        def after(_block: nn.Module, _arguments: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            if self._part != part:
                return
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.begin(Part(BACKWARD, index)))
            if last:
                self.begin(Part(f"after {name}"))

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)


class EachCall(TorchDispatchMode):
    """Within this context, every call that changes the live bytes is a segment of its own."""

    def __init__(self, timeline: Timeline, live: LiveBytes, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._timeline, self._live, self._name, self._count = timeline, live, name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        before = self._live.live
        result = func(*args, **(kwargs or {}))
        if func is not READ_DEVICE and self._live.live != before:
            self._count += 1
            self._timeline.begin(Part(self._name, call=self._count))
        return result


@dataclass(frozen=True)
class Excerpt:
    """The blocks of a transformer that are run.

    Attributes:
        count: of all blocks.
        kept: those that are run, in order.
        repeated: those of them that stand for the ones that are left out, from one to the next.
    """

    count: int
    kept: tuple[int, ...]
    repeated: tuple[int, ...]

    @classmethod
    def of(cls, profile: Profile, family: Family) -> Excerpt | None:
        """The fewest blocks that show what all do; None if that are about all, or if blocks differ."""
        count, captured = family.block_count, captured_blocks(profile)
        if any(f"{family.blocks_attribute}." in name for name in profile.adapter.target_modules):
            return None
        # The gradient of hidden states that are aligned is added in the backward pass of the next block.
        special = {count - 1, *captured, *(block + 1 for block in captured)}
        # From each of these on, blocks are of another kind.
        starts = set(accumulate(family.depths[:-1], initial=0))
        # From this one on, blocks keep their activations.
        first = max(0, count - profile.memory.keep_blocks)
        special |= starts | ({first - 1, first} if 0 < first < count else set())
        groups = [
            [block for block in range(start, end) if block not in special]
            for start, end in pairwise(sorted({first, *starts, count}))
        ]
        repeated = tuple(group[0] for group in groups if group)
        if not repeated:
            return None
        kept = {block for block in special if block < count} | {*repeated, *(block - 1 for block in repeated)}
        return cls(count, tuple(sorted(kept)), repeated) if len(kept) < count - 1 else None

    def without(self, repeated: int) -> tuple[int, ...]:
        """The blocks of another run."""
        return tuple(block for block in self.kept if block != repeated)

    def stand_in(self, block: int) -> int:
        """The position among the kept blocks of the one that stands for a block of the transformer."""
        alike = block if block in self.kept else max(one for one in self.repeated if one < block)
        return self.kept.index(alike)

    def further(self, repeated: int) -> int:
        """How many blocks are left out that this one stands for."""
        position = self.kept.index(repeated)
        return sum(self.stand_in(block) == position for block in range(self.count)) - 1


def captured_blocks(profile: Profile) -> list[int]:
    """The blocks whose hidden states are used outside of the transformer."""
    crepa, layersync = profile.crepa, profile.layersync
    blocks: list[int | None] = [crepa.block_index] if crepa.enabled else []
    blocks += [crepa.teacher_block_index] if crepa.enabled and crepa.use_backbone_features else []
    blocks += [layersync.student_block, layersync.teacher_block] if layersync.enabled else []
    return [block for block in blocks if block is not None]


def with_blocks(profile: Profile, family: Family, kept: Sequence[int]) -> tuple[Profile, Family]:
    """The settings and the family of a transformer that has only these blocks of the original one."""

    def at(block: int | None) -> int | None:
        return kept.index(block) if block in kept else block

    crepa, layersync = profile.crepa, profile.layersync
    keeping = sum(block >= family.block_count - profile.memory.keep_blocks for block in kept)
    tables: dict[str, Table] = {
        "memory": profile.memory.model_copy(update={"keep_blocks": keeping}),
        "crepa": crepa.model_copy(
            update={"block_index": at(crepa.block_index), "teacher_block_index": at(crepa.teacher_block_index)}
        ),
        "layersync": layersync.model_copy(
            update={"student_block": at(layersync.student_block), "teacher_block": at(layersync.teacher_block)}
        ),
    }
    ends = tuple(accumulate(family.depths))
    counts = (sum(end - depth <= block < end for block in kept) for end, depth in zip(ends, family.depths, strict=True))
    return profile.model_copy(update=tables), family.with_blocks(*counts)


def segments_of_all_blocks(
    profile: Profile, family: Family, run: Callable[[Profile, Family, bool], Segments]
) -> list[tuple[Part, Segment]]:
    """The segments of the work of a transformer, in order, from runs of some of its blocks.

    Args:
        profile: the resolved settings.
        family: of the checkpoint.
        run: does the work on the transformer of a family; its last argument says whether the backward is needed.
    """
    excerpt = Excerpt.of(profile, family)
    if excerpt is None:
        return list(run(profile, family, True).items())
    longer = run(*with_blocks(profile, family, excerpt.kept), True)
    shorter = [run(*with_blocks(profile, family, excerpt.without(block)), False) for block in excerpt.repeated]
    return list(_extended(excerpt, longer, shorter))


def highest(segments: Iterable[tuple[Part, Segment]]) -> Bytes:
    """The bytes by part at the peak of the work, without that of building the models."""
    return max((segment.peak for part, segment in segments if part != START), key=Counter.total)


def _extended(excerpt: Excerpt, longer: Segments, shorter: Sequence[Segments]) -> Iterator[tuple[Part, Segment]]:
    """The segments of a step of the whole transformer, in order.

    Args:
        excerpt: the blocks that were run.
        longer: the segments of a run of all kept blocks.
        shorter: those of runs without one of the repeated ones each, and without a backward pass.
    """
    further = [excerpt.further(block) for block in excerpt.repeated]
    longer, *shorter = _comparable(longer, *shorter)
    level: Bytes | None = None
    for (name, in_block), group in groupby(longer, lambda part: (part.name, part.block is not None)):
        parts = list(group)
        if in_block:
            order = range(excerpt.count) if parts[0].block == 0 else reversed(range(excerpt.count))
            segments = [(Part(name, block), longer[Part(name, excerpt.stand_in(block))]) for block in order]
        else:
            less = {part: [one.get(part, longer[part]) for one in shorter] for part in parts}
            segments = [(part, _deeper(longer[part], less[part], further)) for part in parts]
        for part, segment in segments:
            moved = _moved(segment, level or segment.start)
            level = moved.end
            yield part, moved


def _comparable(*runs: Segments) -> list[Segments]:
    """All with the same calls: some optimizers update all weights in one call, others take calls for each weight."""
    calls = [[part for part in segments if part.call] for segments in runs]
    return list(runs) if all(one == calls[0] for one in calls) else [_joined(segments) for segments in runs]


def _joined(segments: Segments) -> Segments:
    """The same with the calls of each name as one segment."""
    joined: Segments = {}
    for part, segment in segments.items():
        whole = part._replace(call=0)
        start, peak, _ = joined.get(whole, segment)
        joined[whole] = Segment(start, max(peak, segment.peak, key=Counter.total), segment.end)
    return joined


def _deeper(longer: Segment, shorter: Sequence[Segment], further: Sequence[int]) -> Segment:
    """The segment with further blocks beyond those of `longer`, which has one more than each of `shorter`."""
    deeper = longer
    for one, count in zip(shorter, further, strict=True):
        growth = (_sum(more, less, -1) for more, less in zip(longer, one, strict=True))
        deeper = Segment(*(_sum(level, grown, count) for level, grown in zip(deeper, growth, strict=True)))
    return deeper


def _moved(segment: Segment, start: Bytes) -> Segment:
    """The same segment, begun at another level."""
    difference = _sum(start, segment.start, -1)
    return Segment(*(_sum(level, difference) for level in segment))


def _sum(one: Bytes, other: Bytes, factor: int = 1) -> Bytes:
    return Counter({part: one[part] + factor * other[part] for part in one.keys() | other.keys()})
