"""Figures of videos: how steady they are, how much moves, and their colors. Videos are `[F, 3, H, W]` in [0, 1]."""

from crepa_cli.measures.compare import Difference, compare, washed_out
from crepa_cli.measures.facts import FACTS, Fact
from crepa_cli.measures.video import Encoder, Measures, measure
from crepa_cli.measures.warping import Flow

__all__ = ["FACTS", "Difference", "Encoder", "Fact", "Flow", "Measures", "compare", "measure", "washed_out"]
