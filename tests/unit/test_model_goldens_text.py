"""What stands before an answer, token by token: model.md 6.3, for tokenizers with and without a BOS of their own."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from molmo2core.annotations import Annotation, Conversation, QuestionAnswer, Turn
from molmo2core.examples import ROOT, Example, Media, TokenizedExample
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.special_tokens import CHAT_END, TEXT_PAD, TextTokenizer, TextTokens, find_special_tokens
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

GEOMETRY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))
TOKENIZERS = {  # model.md 3.5: Qwen begins with its end of turn, O-7B with <|endoftext|>
    "qwen": (TextTokens(), CHAT_END, CHAT_END),
    "o-7b": (TextTokens(bos=TEXT_PAD, eos=TEXT_PAD, pad=TEXT_PAD), TEXT_PAD, TEXT_PAD),
}
IMAGE = "<low_res_im_start>[25]<im_end><im_start>" + "[5]<im_col>" * 5 + "<im_end>"
"""A square image: the view of it, and one crop."""


def preprocessor(text: TextTokens) -> Preprocessor:
    backend = tiny_tokenizer().backend
    tokenizer = TextTokenizer(backend, find_special_tokens(backend, text=text))
    return Preprocessor(
        geometry=GEOMETRY, config=PreprocessingConfig(max_crops=1), tokenizer=tokenizer, weighting="none", seed=0
    )


def images(count: int) -> Media:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(stream, "PNG")
    kind = "images" if count > 1 else "image"
    return Media(kind=kind, files=(stream.getvalue(),) * count, sizes=((60, 60),) * count)


def example(media: Media, annotation: Annotation) -> Example:
    return Example(uid="u", dataset="d", split="train", media=media, annotations=(annotation,))


def written(tokenized: TokenizedExample) -> str:
    """All tokens, runs of patches as their number."""
    patch, words, run = tiny_tokenizer().special.im_patch, [], 0
    for token in [*tokenized.input_ids.tolist(), None]:
        if token == patch:
            run += 1
            continue
        words += [f"[{run}]"] * (run > 0)
        run = 0
        words += [tiny_tokenizer().backend.decode([token], skip_special_tokens=False)] if token is not None else []
    return "".join(words)


@pytest.mark.parametrize(("text", "bos", "eos"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_prompts(text: TextTokens, bos: str, eos: str) -> None:
    """Trap 23: every prompt begins with BOS, also where the tokenizer has none and the end of a turn stands in; traps
    16 and 15: no column after low-resolution rows, and image numbers are text."""
    make = preprocessor(text)
    ask = f"<|im_start|>user\nvqa2: Colour?{CHAT_END}\n<|im_start|>assistant\n"
    question = QuestionAnswer(task="image_qa", question="Colour?", answer="red")
    assert written(make.tokenize_prompt(example(images(1), question), 0)) == f"{bos}{IMAGE}{ask}"
    which = QuestionAnswer(task="multi_image_qa", question="Which?", answer="1")
    two = make.tokenize_prompt(example(images(2), which), 0)
    assert written(two) == f"{bos}Image 1{IMAGE}Image 2{IMAGE}" + ask.replace("vqa2: Colour?", "Which?")
    text_of_root = two.input_ids[(two.subsegment_ids == ROOT) & ~two.is_visual].tolist()
    assert tiny_tokenizer().backend.decode(text_of_root, skip_special_tokens=False) == f"{bos}Image 1Image 2"
    alone = Conversation(task="text", turns=(Turn(role="user", text="Hi"), Turn(role="assistant", text="Yo")))
    prompt = make.tokenize_prompt(example(Media(kind="none"), alone), 0)
    assert written(prompt) == f"{bos}<|im_start|>user\nHi{CHAT_END}\n<|im_start|>assistant\n"
    assert prompt.input_ids[0] == make.tokenizer.special.bos


@pytest.mark.parametrize(("text", "bos", "eos"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_training_form(text: TextTokens, bos: str, eos: str) -> None:
    """A reply ends with the tokenizer's EOS, then the next prompt begins with its own end of turn; weights are on
    replies and their EOS only.  Would catch the single end of turn of the inference template in training."""
    words = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    talk = Conversation(task="text", turns=tuple(Turn(role=role, text=word) for role, word in words))  # type: ignore[arg-type]
    trained = preprocessor(text).tokenize(example(images(1), talk), epoch=0)
    first = f"{bos}{IMAGE}<|im_start|>user\na{CHAT_END}\n<|im_start|>assistant\n"
    second = f"{CHAT_END}\n<|im_start|>user\nc{CHAT_END}\n<|im_start|>assistant\n"
    assert written(trained) == f"{first}b{eos}{second}d"
    targets = trained.target_ids[trained.loss_weights > 0].tolist()
    assert tiny_tokenizer().backend.decode(targets, skip_special_tokens=False) == f"b{eos}d{eos}"
