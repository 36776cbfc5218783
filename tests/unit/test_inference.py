"""How an exported model answers many prompts: which share a batch, and where an answer must end."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core.evaluation import held_out_answers, inference
from molmo2core.evaluation.held_out_answers import ChosenQuestion, answer_few
from molmo2core.evaluation.inference import InferenceModel
from molmo2core.model.generate import GenerationOptions, generate
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.testing.tiny_examples import text_examples
from molmo2core.testing.tiny_model import random_prompt, tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.testing.training import training_config
from molmo2core.training.callbacks.held_out_answers import HeldOutAnswers
from molmo2core.training.composer_model import TrainedMolmo2
from molmo2core.training.config import ValidationConfig


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60_000), max_size=20), st.integers(1, 8))
def test_batches_are_bounded_in_prompts_and_tokens(lengths: list[int], batch_size: int) -> None:
    """Every prompt once, shortest first.  Would catch a long video that shares a batch, or is left out for its
    length."""
    batches = list(inference.batches(lengths, batch_size))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= inference.TOKENS_PER_BATCH


def test_an_answer_ends_with_the_models_positions() -> None:
    """A prompt that leaves room for 3 tokens gets 3, its neighbour all.  Would catch one long prompt that ends a
    whole evaluation with an error, and an answer beyond the positions that were trained."""
    model = tiny_model(3)
    short, long = random_prompt(model.config, seed=1, words=5), random_prompt(model.config, seed=2, words=40)
    decoder = dataclasses.replace(model.config.decoder, max_position_embeddings=len(long.input_ids) + 3)
    model.config = dataclasses.replace(model.config, decoder=decoder)
    tokenizer = tiny_tokenizer()
    preprocessor = Preprocessor(
        geometry=model.config.geometry, config=PreprocessingConfig(), tokenizer=tokenizer, weighting="none", seed=0
    )
    answers = InferenceModel(model=model, preprocessor=preprocessor).answer(
        [long, short], batch_size=2, max_new_tokens=20
    )
    for answer, prompt, room in zip(answers, (long, short), (3, 20), strict=True):
        options = GenerationOptions(max_new_tokens=room, stop_tokens=frozenset({tokenizer.special.eos}))
        expected = generate(model, [prompt], options)[0]
        assert answer == tokenizer.decode(list(expected.token_ids)).strip()
        assert answer


def test_answers_that_do_not_fit_end_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    """The model is whole on one GPU for them.  Would catch a training that dies of it, at the same step whenever it is
    started; another error is still one."""
    model = tiny_model(3)
    config = training_config(validation=ValidationConfig(interval_steps=1, generation_interval_steps=1))
    state = SimpleNamespace(
        model=TrainedMolmo2(model, z_coefficient=0.0), timestamp=SimpleNamespace(batch=SimpleNamespace(value=1))
    )

    class Large:
        error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB")

        def answer(self, whole: Molmo2, step: int) -> None:
            assert all(parameter.equal(whole.get_parameter(name)) for name, parameter in model.named_parameters())
            raise self.error

    answerer = Large()
    answers = HeldOutAnswers(answerer, config, model.config)
    answers.eval_end(state, None)
    assert "warning: no answers at step 1: CUDA out of memory" in capsys.readouterr().out
    answerer.error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        answers.eval_end(state, None)


def test_questions_that_others_wait_for_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches, and time for one.  Would catch answers on one rank that take longer than the others wait in a
    collective: a training that dies at the same step whenever it is started."""
    monkeypatch.setattr(held_out_answers, "_BATCH_SIZE", 2)
    examples = text_examples("said", 5)
    reader = SimpleNamespace(example=lambda index: examples[index])
    questions = [ChosenQuestion(example_index=index, annotation_index=0) for index in range(5)]
    model = tiny_model(3)
    preprocessor = Preprocessor(
        geometry=model.config.geometry,
        config=PreprocessingConfig(),
        tokenizer=tiny_tokenizer(),
        weighting="none",
        seed=0,
    )
    said: list[str] = []
    for seconds, asked in ((0.0, 2), (1e6, 5)):
        answers = answer_few(
            InferenceModel(model=model, preprocessor=preprocessor),
            reader,
            questions,
            max_new_tokens=2,
            seconds=seconds,
            say=said.append,
        )
        assert [answer.uid for answer in answers] == [example.uid for example in examples[:asked]]
    assert said == ["3 of 5 questions not asked: 0 s are over"]
