"""One table: names of our parameters <-> names in released Molmo2 files (model.md 3.3).  Both directions read it.

Ours keeps query, key, value, gate and up apart; the released files fuse them along the output dimension, query-key-
value in that order and **up before gate**.  Everything else is a change of name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from molmo2core.errors import CheckpointError
from molmo2core.model.config import ModelConfig
from molmo2core.model.molmo2 import Molmo2

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], Tensor]
"""One tensor by its name in the files."""


@dataclass(frozen=True)
class Row:
    """One released tensor and our parameters that it holds, concatenated along dimension 0."""

    released: str
    ours: tuple[str, ...]


_VIT = "model.vision_backbone.image_vit"
_POOL = "model.vision_backbone.image_pooling_2d"
_PROJECTOR = "model.vision_backbone.image_projector"
_DECODER = "model.transformer"
HEAD = "lm_head.weight"

_ONCE = (
    Row(f"{_VIT}.positional_embedding", ("vision_encoder.position_embedding",)),
    Row(f"{_VIT}.patch_embedding.weight", ("vision_encoder.patch_embedding.weight",)),
    Row(f"{_VIT}.patch_embedding.bias", ("vision_encoder.patch_embedding.bias",)),
    *(
        Row(f"{_POOL}.{released}.{kind}", (f"connector.{ours}.{kind}",))
        for released, ours in (("wq", "query"), ("wk", "key"), ("wv", "value"), ("wo", "pool_out"))
        for kind in ("weight", "bias")
    ),
    Row(f"{_PROJECTOR}.w1.weight", ("connector.gate.weight",)),
    Row(f"{_PROJECTOR}.w3.weight", ("connector.up.weight",)),
    Row(f"{_PROJECTOR}.w2.weight", ("connector.down.weight",)),
    Row(f"{_DECODER}.wte.embedding", ("decoder.embedding.base",)),
    Row(f"{_DECODER}.wte.new_embedding", ("decoder.embedding.new",)),
    Row(f"{_DECODER}.ln_f.weight", ("decoder.norm.weight",)),
)
_VISION_BLOCK = tuple(
    Row(f"{_VIT}.transformer.resblocks.{{i}}.{released}.{kind}", (f"vision_encoder.blocks.{{i}}.{ours}.{kind}",))
    for released, ours in (
        ("attention.wq", "query"),
        ("attention.wk", "key"),
        ("attention.wv", "value"),
        ("attention.wo", "attention_out"),
        ("attention_norm", "attention_norm"),
        ("ffn_norm", "mlp_norm"),
        ("feed_forward.w1", "mlp_in"),
        ("feed_forward.w2", "mlp_out"),
    )
    for kind in ("weight", "bias")
)
_DECODER_BLOCK = tuple(
    Row(
        f"{_DECODER}.blocks.{{i}}.{released}.weight",
        tuple(f"decoder.stack.blocks.{{i}}.{name}.weight" for name in ours),
    )
    for released, ours in (
        ("attn_norm", ("attention_norm",)),
        ("ff_norm", ("mlp_norm",)),
        ("self_attn.att_proj", ("attention.query_key_value",)),
        ("self_attn.attn_out", ("attention.out",)),
        ("self_attn.q_norm", ("attention.query_norm",)),
        ("self_attn.k_norm", ("attention.key_norm",)),
        ("mlp.ff_proj", ("mlp.up_gate",)),
        ("mlp.ff_out", ("mlp.down",)),
    )
)


def mapping(config: ModelConfig) -> tuple[Row, ...]:
    """The table for one model.  A tied head is stored as a copy of the embedding, so its row reads that parameter."""
    head = "decoder.embedding.base" if config.decoder.tie_embeddings else "decoder.head"
    return (
        *_ONCE,
        Row(HEAD, (head,)),
        *(_numbered(row, i) for i in range(config.vision_encoder.num_layers) for row in _VISION_BLOCK),
        *(_numbered(row, i) for i in range(config.decoder.num_layers) for row in _DECODER_BLOCK),
    )


def num_tensors(config: ModelConfig) -> int:
    """Tensors of a released file (model.md 1.5)."""
    return 8 * config.decoder.num_layers + 4 + 16 * config.vision_encoder.num_layers + 3 + 11


def our_shapes(config: ModelConfig) -> Shapes:
    """Shape of each of our parameters, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Molmo2(config).state_dict().items()}


def released_shapes(config: ModelConfig) -> Shapes:
    """Shape of each released tensor."""
    ours = our_shapes(config)
    return {row.released: (sum(ours[name][0] for name in row.ours), *ours[row.ours[0]][1:]) for row in mapping(config)}


def to_released(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Released name and tensor, one at a time, in the table's order; `state` is keyed by our names."""
    for row in mapping(config):
        parts = [state[name] for name in row.ours]
        yield row.released, parts[0] if len(parts) == 1 else torch.cat(parts)


def from_released(read: Read, config: ModelConfig, where: str) -> Iterator[tuple[str, Tensor]]:
    """Our name and tensor, one released tensor at a time.

    Raises:
        CheckpointError: a tensor has another shape, or the model ties its head and the file's head differs from
            its embedding.
    """
    ours = our_shapes(config)
    expected = released_shapes(config)
    for row in mapping(config):
        tensor = checked_shape(read(row.released), row.released, expected[row.released], where)
        if row.released == HEAD and config.decoder.tie_embeddings:
            if not torch.equal(tensor, read(f"{_DECODER}.wte.embedding")):
                raise CheckpointError(
                    f"{where}: {HEAD}",
                    found="a head that differs from the embedding",
                    expected="the same values, as model.decoder.tie_embeddings says",
                    mend="set tie_embeddings: false",
                )
            continue
        yield from zip(row.ours, tensor.split([ours[name][0] for name in row.ours]), strict=True)


def checked_shape(tensor: Tensor, name: str, expected: tuple[int, ...], where: str) -> Tensor:
    """`tensor`, if it has the `expected` shape.

    Raises:
        CheckpointError: it has not.
    """
    if tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"{where}: {name}",
            found=f"shape {tuple(tensor.shape)}",
            expected=str(expected),
            mend="choose the recipe's model that these weights belong to",
        )
    return tensor


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Refuse missing and unknown tensor names.

    Raises:
        CheckpointError: names the first of them and how many there are.
    """
    for kind, names in (("missing", expected - found), ("unknown", found - expected)):
        if names:
            raise CheckpointError(
                f"{where}: {min(names)}",
                found=f"{kind} tensor ({len(names)} {kind} of {len(expected)})",
                expected="exactly the tensors of this model",
                mend="choose the recipe's model that these weights belong to",
            )


def _numbered(row: Row, i: int) -> Row:
    return Row(row.released.format(i=i), tuple(name.format(i=i) for name in row.ours))
