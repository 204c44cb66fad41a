"""Deinterlaces the frames of a video that are marked as interlaced."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction

import av
from av.filter import Graph
from av.video.frame import VideoFrame


def deinterlaced(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """As many frames as given, in their order; those marked as interlaced become whole pictures."""
    graph: Graph | None = None
    form: tuple[int, int, str] | None = None
    for frame in frames:
        # A graph takes frames of one form.
        if graph and form != _form(frame):
            yield from _finished(graph)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, form = _deinterlacer(frame), _form(frame)
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _ready(graph)
    if graph:
        yield from _finished(graph)


def _form(frame: VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _deinterlacer(frame: VideoFrame) -> Graph:
    """A graph with the filter bwdif, which returns a frame for every frame of the form of `frame`."""
    graph = Graph()
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base=str(frame.time_base or Fraction(1)),
        colorspace=str(frame.colorspace),
        range=str(frame.color_range),
    )
    graph.link_nodes(source, graph.add("bwdif", mode="send_frame", deint="interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _ready(graph: Graph) -> Iterator[VideoFrame]:
    """The frames that a graph has finished."""
    with suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.vpull()


def _finished(graph: Graph) -> Iterator[VideoFrame]:
    """The frames that a graph still holds."""
    graph.vpush(None)
    yield from _ready(graph)
