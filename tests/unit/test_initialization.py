"""Random weights: what they are, and what they do not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from molmo2core.model.config import ConnectorConfig, named_config
from molmo2core.model.decoder import RMSNorm
from molmo2core.model.initialization import build_model, empty_model, initial_value, initialize_parameters
from molmo2core.model.molmo2 import Molmo2, group_of_parameter
from molmo2core.testing.tiny_model import tiny_config


def test_an_empty_model_takes_its_values_afterwards() -> None:
    """Constructed on the meta device, then `to_empty`: every parameter must be written.  Would catch one that keeps
    what was in memory, and a buffer, which nobody would write."""
    config = tiny_config()
    with torch.device("meta"):
        model = Molmo2(config)
    assert all(parameter.is_meta for parameter in model.parameters()) and not list(model.buffers())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize_parameters(model, seed=3)
    built = build_model(config, seed=3).state_dict()
    assert all(torch.equal(tensor, built[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in built.values())


def test_values_depend_on_seed_and_name_alone() -> None:
    """Not on the order, nor on what else is drawn, nor on the global generator, nor on other parts of the model."""
    config = tiny_config()
    torch.manual_seed(1)
    model = build_model(config, seed=3)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(2)
    with torch.no_grad():
        for name in reversed(values):
            model.get_parameter(name).fill_(7.0)
            initialize_parameters(model, seed=3, names=[name])
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    deeper = replace(config, decoder=replace(config.decoder, num_layers=5))
    assert all(torch.equal(build_model(deeper, seed=3).get_parameter(name), tensor) for name, tensor in values.items())
    for name, tensor in values.items():  # drawn whole by whoever holds a part of it
        whole = initial_value(name, tuple(tensor.shape), config, seed=3)
        assert torch.equal(torch.cat(list(whole.chunk(3))), tensor)
    other = build_model(config, seed=4).state_dict()
    drawn = [name for name, tensor in values.items() if tensor.ndim == 2 and "position" not in name]
    assert all(not torch.equal(other[name], values[name]) for name in drawn)
    same_shape = "vision_encoder.blocks.0.query.weight", "vision_encoder.blocks.1.query.weight"
    assert not torch.equal(values[same_shape[0]], values[same_shape[1]])
    blocks = torch.stack([values[f"decoder.stack.blocks.{i}.mlp.up_gate.weight"].flatten() for i in range(3)])
    assert torch.corrcoef(blocks).triu(1).abs().max() < 0.026  # 5 standard deviations of 36,864 independent pairs


def test_names_given_are_all_that_is_written() -> None:
    """What a checkpoint filled stays; what it does not hold is drawn."""
    model = empty_model(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    new = {name for name, _ in model.named_parameters() if group_of_parameter(name) == "connector"}
    initialize_parameters(model, seed=0, names=new)
    for name, parameter in model.named_parameters():
        assert bool((parameter == 7.0).all()) == (name not in new), name


@pytest.mark.parametrize(("width", "deviation"), [(96, 96**-0.5), (2560, 0.02), (4096, 0.02)])
def test_published_spread(width: int, deviation: float) -> None:
    """model.md 3.4: connector and new tokens 0.02 at published widths, 1/sqrt(width) where that is more (DECISIONS
    D10).  Measured on 3.9e5 numbers or more: the standard deviation is exact to 0.5 % (5 of its own)."""
    config = named_config("4b") if width > 96 else tiny_config()
    config = replace(config, decoder=replace(config.decoder, width=width), connector=ConnectorConfig(mlp_width=340))
    for name, shape in (
        ("decoder.embedding.new", (128 * 40, width)),
        ("connector.query.weight", (340, 1152)),
        ("connector.down.weight", (width * 12, 340)),
    ):
        values = initial_value(name, shape, config, seed=0)
        assert values.dtype == torch.float32 and values.shape == shape
        assert float(values.std()) == pytest.approx(deviation, rel=0.005), name
        assert abs(float(values.mean())) < 5 * deviation / math.sqrt(values.numel())


def test_norms_are_one_and_biases_zero() -> None:
    """By kind of module, not by name as the code does.  Would catch a norm whose name does not end as the others'."""
    model = build_model(tiny_config("olmo"), seed=0)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | RMSNorm)]
    assert len(norms) == 2 * 3 + 4 * 3 + 1
    weights = {id(norm.weight) for norm in norms}
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1 and id(parameter) not in weights]
    assert len(vectors) == 8 * 3 + 1 + 4 and not any(bool(vector.any()) for vector in vectors)
