"""Cross-frame Representation Alignment as a library: plain torch, usable in any training loop.

`Crepa` is the loss with its projector, `CoefficientSchedule` what it is multiplied with, `TokenGrid` where tokens are.
`layersync_loss` aligns a block with a deeper one of the same transformer.
"""

from crepa_cli.alignment.grid import TokenGrid
from crepa_cli.alignment.layersync import layersync_loss
from crepa_cli.alignment.loss import Alignment, Crepa
from crepa_cli.alignment.schedule import CoefficientSchedule

__all__ = ["Alignment", "CoefficientSchedule", "Crepa", "TokenGrid", "layersync_loss"]
