"""The findings of doctor: checks and the plan, and their display."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from crepa_cli.errors import UserError

if TYPE_CHECKING:
    from crepa_cli.memory.fit import Fit
    from crepa_cli.memory.savings import Fitting, Saving

Status = Literal["fine", "warning", "failure"]
Item = TypeVar("Item")

FIGURES = {"bytes", "preparation", "training", "validation", "GPU"}
"""Columns that hold numbers."""
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141, 180)
"""Memory of GPUs in GB, as they are sold."""
COLORS: dict[Status, str] = {"fine": "green", "warning": "yellow", "failure": "bold red"}


@dataclass(frozen=True)
class Check:
    """One line of the report: what was checked, the result, and what to do about it."""

    name: str
    status: Status
    message: str
    advice: str = ""


@dataclass(frozen=True)
class BucketCount:
    """The number of clips that are trained at one shape."""

    frames: int
    height: int
    width: int
    clips: int


@dataclass(frozen=True)
class Memory:
    """Predicted bytes.

    Attributes:
        training: bytes by part at the peak of a training step.
        preparation: peak of each model used in preparation; they are never in memory together.
        validation: peak of a validation, with what training keeps meanwhile; 0 if there is none.
        peak: bytes that a device must have free.
        limit: bytes that it has free; None if they are unknown.
        savings: settings that reduce the memory of training, largest saving first.
        fitting: what fits, if the limit is too low.
    """

    training: dict[str, int]
    preparation: dict[str, int]
    validation: int
    peak: int
    limit: int | None
    savings: list[Saving]
    fitting: Fitting | None


@dataclass(frozen=True)
class FamilyMemory:
    """Predicted bytes of a family's default training for a task.

    Attributes:
        limit: what the device has free; None if there is no GPU.
    """

    family: str
    task: str
    checkpoint: str
    shape: str
    training: int
    preparation: int
    validation: int
    limit: int | None

    @property
    def peak(self) -> int:
        """Bytes that a device must have free."""
        return max(self.training, self.preparation, self.validation)

    @property
    def fits(self) -> bool:
        """Whether a known device has them free."""
        return self.limit is not None and self.peak <= self.limit

    @property
    def card(self) -> str:
        """The smallest GPU on which it would train."""
        sizes = [size for size in CARDS if self.peak <= size * 10**9]
        return f"{sizes[0]} GB" if sizes else f"over {CARDS[-1]} GB"


@dataclass(frozen=True)
class ClipFindings:
    """Clips that are likely to be mistakes, by their names, and the share of each that is used.

    Attributes:
        near_identical: pairs that look the same.
        black: clips without light.
        frozen: clips in which nothing moves.
        bars: widths of black bars by side, in pixels of the clip.
        frame_rates: unusual ones.
        same_caption: captions of several clips, with these.
        used: share of the seconds of each video that is trained on.
    """

    near_identical: list[tuple[str, str]]
    black: list[str]
    frozen: list[str]
    bars: dict[str, dict[str, int]]
    frame_rates: dict[str, float]
    same_caption: dict[str, list[str]]
    used: dict[str, float]


@dataclass
class Plan:
    """The plan of training with these settings, as far as it can be determined.

    Attributes:
        checks: checks of the settings, the checkpoint, the clips and the disk.
        profile: the resolved settings by table and key.
        buckets: the shapes to which clips are resized.
        skipped: the reason for each skipped clip, by its name.
        findings: what the clips look like; None if they could not be looked at.
        cache_bytes: predicted size of the cache by part: latents, prompts and features.
        memory: predicted memory of training.
        fit_asked: whether settings that fit a GPU were searched for.
        fit: those settings; None if there are none.
    """

    checks: list[Check] = field(default_factory=list)
    profile: dict[str, Any] | None = None
    buckets: list[BucketCount] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    findings: ClipFindings | None = None
    cache_bytes: dict[str, int] | None = None
    memory: Memory | None = None
    fit_asked: bool = False
    fit: Fit | None = None

    def add(self, name: str, status: Status, message: str, advice: str = "") -> None:
        """Add a check."""
        self.checks.append(Check(name, status, message, advice))

    def attempt(self, name: str, work: Callable[[], Item]) -> Item | None:
        """The result of `work`; if it raises a UserError, add a failed check of this name and return None."""
        try:
            return work()
        except UserError as error:
            self.add(name, "failure", str(error))
            return None


@dataclass(frozen=True)
class Report:
    """All findings: the plan if settings were given, otherwise the memory of each family."""

    environment: list[Check]
    plan: Plan | None
    families: list[FamilyMemory] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if training would start, 2 for mistakes in the plan, 1 for an environment that cannot train."""
        if self.plan and _failed(self.plan.checks):
            return 2
        return 1 if _failed(self.environment) else 0

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        checks = [*self.environment, *(self.plan.checks if self.plan else [])]
        plan = asdict(self.plan) if self.plan else None
        if plan:
            del plan["checks"], plan["fit"], plan["fit_asked"]
        families = [asdict(family) for family in self.families]
        contents = {"checks": [asdict(check) for check in checks], "plan": plan, "families": families}
        if self.plan and self.plan.fit_asked:
            contents["fit"] = self.plan.fit.to_json() if self.plan.fit else None
        return contents

    def show(self, console: Console) -> None:
        """Print the report as tables."""
        console.print(_table("Environment", self.environment))
        if self.plan:
            console.print(_table("Plan", self.plan.checks))
            if self.plan.memory:
                console.print(memory_table(self.plan.memory))
        if self.families:
            console.print(families_table(self.families))
        console.print(self._verdict())

    def _verdict(self) -> Text:
        if self.exit_code:
            return Text("Training would not start. Fix the failures above.", style=COLORS["failure"])
        if self.plan is None:
            return Text(f"{_suitable(self.families)} No settings were checked: crepa init writes a crepa.toml here.")
        return Text("Training would start.", style=COLORS["fine"])


def _suitable(families: list[FamilyMemory]) -> str:
    """Which families would train here."""
    limit = families[0].limit if families else None
    if limit is None:
        return "No GPU is usable: this machine runs --demo, and the table says how large a GPU each family needs."
    fitting, others = ([f"{one.family} {one.task}" for one in families if one.fits is fits] for fits in (True, False))
    known = f"With {decimal(limit)} free, "
    if fitting:
        known += f"{', '.join(fitting)} would train as their presets are. "
    if others:
        known += f"{', '.join(others)} would need lighter settings: crepa doctor --model FAMILY --task TASK names them."
    return known.strip()


def _failed(checks: list[Check]) -> bool:
    return any(check.status == "failure" for check in checks)


def _table(title: str, checks: list[Check]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for check in checks:
        status = Text(check.status, style=COLORS[check.status])
        table.add_row(status, Text(check.name), Text("\n".join(_lines(check))))
    return table


def _lines(check: Check) -> Iterator[str]:
    yield check.message
    if check.advice:
        yield f"→ {check.advice}"


def memory_table(memory: Memory) -> Table:
    """The memory of training by part, of its preparation and of a validation, and the settings that save most."""
    table = _figures("Memory, predicted with fake tensors", "part", "bytes")
    for part, size in memory.training.items():
        table.add_row(part, decimal(size))
    table.add_row("training", decimal(sum(memory.training.values())), style="bold", end_section=True)
    for part, size in memory.preparation.items():
        table.add_row(f"{part}, before training", decimal(size))
    if memory.validation:
        table.add_row("validation", decimal(memory.validation))
    table.add_section()
    for saving in memory.savings:
        table.add_row(f"--set {saving.setting}", f"-{decimal(saving.saved)}", style="dim")
    return table


def families_table(families: list[FamilyMemory]) -> Table:
    """The memory of every family's default training, and the smallest GPU that has it."""
    columns = "family", "task", "checkpoint", "clips", "preparation", "training", "validation", "GPU"
    table = _figures("Memory of each family with the preset of its task", *columns)
    for one in families:
        sizes = decimal(one.preparation), decimal(one.training), decimal(one.validation), one.card
        red = one.limit is not None and not one.fits
        row = one.family, one.task, one.checkpoint, one.shape, *sizes
        table.add_row(*row, style=COLORS["failure"] if red else None)
    return table


def _figures(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in FIGURES else "left", overflow="fold")
    return table
