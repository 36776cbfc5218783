"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of a Molmo2.

A layer with weight W [O, I] computes x W^T + (x A^T) B^T * alpha / rank: A [rank, I] is drawn, B [O, rank] starts at 0,
so that training starts from the model as it was.  W keeps its name; A and B stand beside it as `low_rank_a` and
`low_rank_b`, so that checkpoints hold the plain model and the adapters, and merging removes names but changes none.

A fused matrix (query_key_value, up_gate) has one adapter: one A, shared, and one B, whose rows are the queries', keys'
and values' own.  It is the matrix of the released files and the one that is sharded, and nobody need know what its rows
mean.  Nothing is lost: three adapters of rank r are one of rank 3r with zeros in B.

Shape legend: I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.randomness import generator
from molmo2core.training.config import LowRankConfig, LowRankPart

_A, _B = "low_rank_a", "low_rank_b"
_LAYERS: dict[LowRankPart, str] = {
    "decoder_attention": r"decoder\.stack\.blocks\.\d+\.attention\.(query_key_value|out)",
    "decoder_mlp": r"decoder\.stack\.blocks\.\d+\.mlp\.(up_gate|down)",
    "vision_encoder": r"vision_encoder\.blocks\.\d+\.(query|key|value|attention_out|mlp_in|mlp_out)",
    "connector": r"connector\.(query|key|value|pool_out|gate|up|down)",
}


class LowRankLinear(nn.Linear):
    """`layer` with an adapter; weight and bias are the layer's own parameters."""

    def __init__(self, layer: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = scale
        self.low_rank_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features, dtype=torch.float32))
        self.low_rank_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        update = F.linear(F.linear(x, self.low_rank_a), self.low_rank_b)
        return F.linear(x, self.weight, self.bias) + update * self.scale


@torch.no_grad()
def add_adapters(model: Molmo2, config: LowRankConfig, *, seed: int) -> None:
    """Give the layers of `config.parts` adapters that are trained; their own weights are left as they are.

    A is normal with standard deviation 1/sqrt(I), a function of seed and name alone.
    """
    layers = [name for name, _ in model.named_modules() if _is_adapted(name, config)]
    for name in layers:
        parent_name, _, child = name.rpartition(".")
        parent, layer = model.get_submodule(parent_name), model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        adapted = LowRankLinear(layer, rank=config.rank, scale=config.alpha / config.rank)
        drawn = generator("low rank", seed, name).standard_normal(tuple(adapted.low_rank_a.shape), dtype="float32")
        adapted.low_rank_a.copy_(torch.from_numpy(drawn).mul_(layer.in_features**-0.5))
        setattr(parent, child, adapted)


@torch.no_grad()
def merge_adapters(weights: Mapping[str, Tensor], config: LowRankConfig) -> dict[str, Tensor]:
    """Parameters of the plain model that computes what the adapted one does.

    Args:
        weights: all parameters of a model with adapters, by name, whole and on CPU.
        config: what the adapters were added with.

    Returns:
        The same without adapters: W + B A * alpha / rank, computed in float32, in W's dtype.
    """
    merged = {name: value for name, value in weights.items() if not name.endswith((_A, _B))}
    for name in weights:
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            weight = merged[f"{layer}weight"]
            update = weights[layer + _B].float() @ weights[name].float() * (config.alpha / config.rank)
            merged[f"{layer}weight"] = (weight.float() + update).to(weight.dtype)
    return merged


def _is_adapted(name: str, config: LowRankConfig) -> bool:
    return any(re.fullmatch(_LAYERS[part], name) for part in config.parts)
