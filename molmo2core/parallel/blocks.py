"""How blocks run while training: compiled, and computed again in the backward pass instead of kept.

Both replace a block's `forward` and nothing else.  Names of modules and parameters stay, so checkpoints know nothing
of it; FSDP's hooks stay outside, so that a block is gathered once for its recomputation and its backward pass.  Without
gradients (validation, generation) a block runs as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from molmo2core.model.molmo2 import Molmo2

Forward = Callable[..., Any]


def checkpoint_activations(
    model: Molmo2, *, vision_encoder: int = 0, connector: bool = False, decoder: int = 0, on_host: bool = False
) -> None:
    """Have blocks keep their inputs alone for the backward pass, which computes the rest again.

    Args:
        vision_encoder, decoder: every n-th block, from the first; 0 is none.
        on_host: keep them in the host's memory, pinned where there is a GPU.
    """
    chosen: list[nn.Module] = [*_every(model.vision_encoder.blocks, vision_encoder)]
    chosen += [model.connector] if connector else []
    chosen += _every(model.decoder.stack.blocks, decoder)
    for module in chosen:
        _while_training(module, partial(_recomputed, on_host=on_host))
    model.register_forward_pre_hook(_keep_no_casts)


def compile_blocks(model: Molmo2) -> None:
    """Compile the blocks of decoder and vision encoder, one program for all blocks of a kind.

    Attention stays out of it: its kernels are compiled or fused already, SDPA by document depends on data, and context
    parallelism exchanges heads there.  Called after those were set, before `checkpoint_activations`, which then runs
    the compiled block twice.
    """
    vision, decoder = list(model.vision_encoder.blocks), list(model.decoder.stack.blocks)
    # One function for all blocks: a program is good for the functions that it was compiled with, and after eight
    # programs torch gives up and runs everything as it is.
    for attentions in (vision, [block.attention for block in decoder]):
        attend = torch.compiler.disable(attentions[0].attend)
        for module in attentions:
            module.attend = attend
    for block in [*vision, *decoder]:
        _while_training(block, torch.compile)


def _keep_no_casts(model: nn.Module, _: Any) -> None:
    """Autocast would keep a bfloat16 copy of every weight until the forward pass ends: of blocks that sharding or
    recomputation has freed, too.  It turns its cache on again when it ends."""
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        torch.set_autocast_cache_enabled(False)


def _every(blocks: nn.ModuleList, interval: int) -> Iterable[nn.Module]:
    return list(blocks)[::interval] if interval else ()


def _recomputed(forward: Forward, *, on_host: bool) -> Forward:
    def run(*arguments: Any) -> Any:
        # What the block saves is left to `checkpoint`, which saves tensors among its arguments as others do: those go.
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if on_host else nullcontext():
            # No random state to restore: dropout's masks follow from its keys.
            return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return run


def _while_training(module: nn.Module, change: Callable[[Forward], Forward]) -> None:
    plain = module.forward
    changed = change(plain)

    def forward(*arguments: Any) -> Any:
        return changed(*arguments) if torch.is_grad_enabled() else plain(*arguments)

    module.forward = forward
