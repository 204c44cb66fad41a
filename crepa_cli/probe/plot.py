"""The measurement plotted over depth."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from crepa_cli.errors import counted
from crepa_cli.probe.answer import Answer


def draw_measurement(answer: Answer) -> bytes:
    """An SVG of every figure by block, with one curve per noise level; the same measurement gives the same bytes."""
    measurement = answer.measurement
    assert measurement is not None, "there must be a measurement to draw"
    charts = {
        "CKNNA": measurement.cknna,
        "linear CKA": measurement.cka,
        "drift of states / features": measurement.drift,
    }
    if measurement.projector:
        charts = {"projector's cosine,\nheld-out clips": measurement.projector.cosines.mean(0)} | charts
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "crepa", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 2 + 2.4 * len(charts)), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(len(charts), sharex=True), charts.items(), strict=True):
            _draw_levels(axes, values, measurement.sigmas)
            _mark_blocks(axes, answer)
            axes.set_ylabel(title)
            axes.grid(alpha=0.3)
        figure.suptitle(f"{answer.checkpoint} ({answer.task}), {counted(measurement.clips, 'clip')}")
        axes.set_xlabel("block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def _draw_levels(axes: Axes, values: Tensor, sigmas: list[float]) -> None:
    """Curves of `[blocks, levels]`, lighter with more noise, and their mean."""
    for level, sigma in enumerate(sigmas):
        shade = matplotlib.colormaps["viridis"](level / len(sigmas))
        axes.plot(values[:, level].tolist(), color=shade, linewidth=1, label=f"noise level {sigma:g}")
    axes.plot(values.mean(1).tolist(), color="black", linewidth=1.8, label="mean")


def _mark_blocks(axes: Axes, answer: Answer) -> None:
    axes.axvline(answer.default.block, color="gray", linestyle=":", label=f"default, block {answer.default.block}")
    if answer.recommended:
        block = answer.recommended.block
        axes.axvline(block, color="tab:red", linestyle="--", label=f"recommended, block {block}")
