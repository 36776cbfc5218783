"""An exported model that answers prompts: used by evaluation and by the registered model that MLflow serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from molmo2core.checkpoints.import_hf import import_released
from molmo2core.errors import RecipeError
from molmo2core.examples import Example, TokenizedExample
from molmo2core.model.generate import generate
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.special_tokens import load_tokenizer

_MID_GREY = 127


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
        """Greedy answers, in the order of `prompts`; prompts of similar length share a batch."""
        tokenizer = self.preprocessor.tokenizer
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tokens = generate(
                self.model,
                [prompts[i] for i in batch],
                max_new_tokens=max_new_tokens,
                eos=tokenizer.special.eos,
            )
            for i, ids in zip(batch, tokens, strict=True):
                answers[i] = tokenizer.decode(ids).strip()
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
