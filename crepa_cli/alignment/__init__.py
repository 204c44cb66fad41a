"""Cross-frame Representation Alignment as a library: plain torch, usable in any training loop.

`Crepa` is the loss with its projector, `CoefficientSchedule` gives the factor (lambda) it is multiplied by, and
`TokenGrid` describes the layout of tokens. `layersync_loss` aligns a block with a deeper block of the same transformer.
"""

from crepa_cli.alignment.grid import TokenGrid
from crepa_cli.alignment.layersync import layersync_loss
from crepa_cli.alignment.loss import Alignment, Crepa
from crepa_cli.alignment.schedule import CoefficientSchedule

__all__ = ["Alignment", "CoefficientSchedule", "Crepa", "TokenGrid", "layersync_loss"]
