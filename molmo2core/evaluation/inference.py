"""An exported model that answers prompts: used by evaluation and by the registered model that MLflow serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from molmo2core.checkpoints.import_hf import import_released
from molmo2core.errors import RecipeError
from molmo2core.examples import Example, TokenizedExample
from molmo2core.model.generate import GenerationOptions, generate
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.special_tokens import load_tokenizer

_MID_GREY = 127
TOKENS_PER_BATCH = 32_768
"""Of prompts that share a batch, so that long videos are answered one by one, whatever the batch size."""


@dataclass(frozen=True, kw_only=True)
class InferenceModel:
    """Model and preprocessing of one exported folder."""

    model: Molmo2
    preprocessor: Preprocessor

    def prompt(self, example: Example, annotation_index: int) -> TokenizedExample:
        """The question of one annotation, up to where the answer begins.

        Raises:
            RecipeError: it is longer than the model's positions.
        """
        prompt = self.preprocessor.tokenize_prompt(example, annotation_index)
        limit = self.model.config.decoder.max_position_embeddings
        if len(prompt.input_ids) >= limit:
            raise RecipeError(
                f"{example.dataset}/{example.uid}",
                found=f"a prompt of {len(prompt.input_ids)} tokens",
                expected=f"fewer than the model's {limit} positions",
                mend="lower max_frames, max_crops or max_images of evaluation.preprocessing",
            )
        return prompt

    def answer(
        self,
        prompts: Sequence[TokenizedExample],
        *,
        batch_size: int,
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy answers, in the order of `prompts`; prompts of similar length share a batch.

        An answer ends early where the model has no further position.
        """
        tokenizer = self.preprocessor.tokenizer
        limit = self.model.config.decoder.max_position_embeddings
        answers = [""] * len(prompts)
        for batch in batches([len(prompt.input_ids) for prompt in prompts], batch_size):
            options = [
                GenerationOptions(
                    max_new_tokens=min(max_new_tokens, limit - len(prompts[i].input_ids)),
                    stop_tokens=frozenset({tokenizer.special.eos}),
                )
                for i in batch
            ]
            for i, answer in zip(batch, generate(self.model, [prompts[i] for i in batch], options), strict=True):
                answers[i] = tokenizer.decode(list(answer.token_ids)).strip()
        return answers


def load_inference_model(folder: Path, preprocessing: PreprocessingConfig) -> InferenceModel:
    """Load an exported folder (released format) onto the accelerator, if there is one.

    Raises:
        CheckpointError: the folder is incomplete or not of this format.
    """
    model = import_released(folder).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    preprocessor = Preprocessor(
        geometry=model.config.geometry,
        config=preprocessing,
        tokenizer=load_tokenizer(folder),
        weighting="none",
        seed=0,
    )
    return InferenceModel(model=model, preprocessor=preprocessor)


def blanked(prompt: TokenizedExample) -> TokenizedExample:
    """The same prompt with every pixel mid-grey: what the model says without seeing."""
    return dataclasses.replace(prompt, crops=np.full_like(prompt.crops, _MID_GREY))


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of `lengths`, ascending, in groups of at most `batch_size` and, above one, of TOKENS_PER_BATCH."""
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) >= batch_size or tokens + lengths[index] > TOKENS_PER_BATCH):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch
