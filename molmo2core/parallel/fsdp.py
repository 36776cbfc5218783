"""What FSDP gathers at a time (training_and_evaluation.md 1.7).

Units are the transformer blocks, the connector and, where the head is a matrix of its own, the embedding: each is
gathered for its forward and its backward pass alone.  Head, norms and the first layer of the vision encoder form the
root unit, whose parameters stay gathered from forward to the end of backward, so that the loss may use the head outside
`forward`.  A head that is tied to the embedding keeps that one in the root unit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from molmo2core.model.connector import Connector
from molmo2core.model.decoder import DecoderBlock, TokenEmbedding
from molmo2core.model.molmo2 import Molmo2
from molmo2core.model.vision_encoder import VisionBlock


def fsdp_units(model: Molmo2) -> Callable[[nn.Module], bool]:
    """Whether a module below `model` is sharded and gathered on its own."""
    kinds: tuple[type[nn.Module], ...] = (DecoderBlock, VisionBlock, Connector)
    if model.decoder.head is not None:
        kinds += (TokenEmbedding,)
    return lambda module: isinstance(module, kinds)


def reduce_a_head_alone(model: Molmo2) -> None:
    """Have FSDP reduce the gradient of a head below which nothing is trained.  Call before the model is sharded.

    FSDP notices a backward pass by the gradient of what `model` returns.  Without one the head's would stay on its
    rank, and no step would change it.
    """
    model.register_forward_hook(_with_a_gradient)


def _with_a_gradient(_model: nn.Module, _arguments: object, hidden: Tensor) -> Tensor:
    return hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.requires_grad_()
