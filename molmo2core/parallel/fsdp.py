"""What FSDP gathers at a time.

Units are the transformer blocks; embedding, connector, norms and head form the root unit, whose parameters stay
gathered from forward to the end of backward, so that the loss may use the head outside `forward`, and a head tied to
the embedding is in one unit with it.
"""

from __future__ import annotations

from torch import nn

from molmo2core.model.decoder import DecoderBlock
from molmo2core.model.vision_encoder import VisionBlock


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether `module` is sharded and gathered on its own."""
    return isinstance(module, DecoderBlock | VisionBlock)
