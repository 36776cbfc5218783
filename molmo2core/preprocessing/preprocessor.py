"""Example -> TokenizedExample: decode the medium, write the annotations as a message tree, linearize it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molmo2core.annotations import Annotation
from molmo2core.errors import DataError
from molmo2core.examples import Example, TokenizedExample
from molmo2core.message_tree.config import Weighting
from molmo2core.message_tree.linearize import LinearTree, linearize, linearize_prompt
from molmo2core.message_tree.tree import Branch, MessageTree
from molmo2core.preprocessing.chat import Dialogue, encode_dialogue, inference_dialogue, training_dialogue
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.randomness import generator
from molmo2core.preprocessing.root import Root, build_root
from molmo2core.preprocessing.seen_tracks import as_seen
from molmo2core.special_tokens import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class DrawnBranch:
    """One annotation as it is asked and answered this time."""

    number: int
    """Of the annotation in its example."""
    annotation: Annotation
    """As it is seen (seen_tracks.py)."""
    dialogue: Dialogue


@dataclass(frozen=True, kw_only=True)
class DrawnExample:
    """Everything about the training form of an example that is drawn."""

    branches: tuple[DrawnBranch, ...]
    """In the order in which they appear."""
    high_res: bool
    """Whether its image is seen in more crops."""


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """Settings of one training stage or evaluation; pure otherwise."""

    geometry: VisualGeometry
    config: PreprocessingConfig
    tokenizer: TextTokenizer
    weighting: Weighting
    seed: int

    def tokenize(self, example: Example, *, epoch: int, branches: tuple[int, int] | None = None) -> TokenizedExample:
        """Training form of `example`; arguments as of `draw`.

        Raises:
            DataError: the medium does not decode or an annotation contradicts itself.
        """
        drawn = self.draw(example, epoch=epoch, branches=branches)
        tree_branches = [
            encode_dialogue(branch.dialogue, branch.annotation.task, self.tokenizer) for branch in drawn.branches
        ]
        root = self._root(example, high_res=drawn.high_res)
        special = self.tokenizer.special
        linear = linearize(
            MessageTree(root_ids=root.ids, branches=tuple(tree_branches)),
            eos=special.eos,
            visual=special.visual,
            weighting=self.weighting,
        )
        return _tokenized(example, root, linear, tree_branches)

    def draw(self, example: Example, *, epoch: int, branches: tuple[int, int] | None = None) -> DrawnExample:
        """What is drawn for `example`: it depends on seed, dataset, uid and epoch alone.

        Args:
            example: at least one annotation.
            epoch: how often the example was drawn before; other phrasings and another order of branches.
            branches: half-open range of annotations that become branches, if the tree was split; default all.

        Raises:
            DataError: there are no such branches, or an annotation contradicts itself.
        """
        first, last = branches if branches is not None else (0, len(example.annotations))
        if not 0 <= first < last <= len(example.annotations):
            raise DataError(
                f"{example.dataset}/{example.uid}",
                found=f"branches {first} to {last} wanted",
                expected=f"a part of its {len(example.annotations)} annotations",
                mend="plan packs again from the shards in use",
            )
        key = (self.seed, example.dataset, example.uid, epoch)
        order = first + generator(*key, "branch order", first, last).permutation(last - first)
        annotations = self.seen_annotations(example)
        drawn = []
        for number in order.tolist():
            rng = generator(*key, "phrasing", number)
            dialogue = training_dialogue(annotations[number], self.config.style, rng, len(example.media.files))
            drawn.append(DrawnBranch(number=number, annotation=annotations[number], dialogue=dialogue))
        return DrawnExample(branches=tuple(drawn), high_res=self._draws_high_res(example, epoch))

    def tokenize_prompt(self, example: Example, annotation_index: int) -> TokenizedExample:
        """Inference form: the root and one annotation's prompt up to `<|im_start|>assistant\\n`, first phrasing.

        Earlier turns of a conversation are given; all loss weights are 0 and the targets mean nothing.

        Raises:
            DataError: the medium does not decode.
        """
        annotation = self.seen_annotations(example)[annotation_index]
        dialogue = inference_dialogue(annotation, self.config.style)
        branch = encode_dialogue(dialogue, annotation.task, self.tokenizer)
        root = self._root(example, high_res=False)
        special = self.tokenizer.special
        tree = MessageTree(root_ids=root.ids, branches=(branch,))
        return _tokenized(example, root, linearize_prompt(tree, eos=special.eos, visual=special.visual), [branch])

    def seen_annotations(self, example: Example) -> tuple[Annotation, ...]:
        """The annotations as they are asked for and answered: tracks at times that are seen."""
        return as_seen(example.annotations, example.media.duration_seconds, example.media.fps, self.config)

    def _draws_high_res(self, example: Example, epoch: int) -> bool:
        """Whether an image is seen in more crops this time; all parts of a split tree agree."""
        if example.media.kind != "image" or example.dataset not in self.config.high_res.datasets:
            return False
        rng = generator(self.seed, example.dataset, example.uid, epoch, "high resolution")
        return bool(rng.random() < self.config.high_res.probability)

    def _root(self, example: Example, *, high_res: bool) -> Root:
        return build_root(
            example, geometry=self.geometry, config=self.config, tokenizer=self.tokenizer, high_res=high_res
        )


def _tokenized(example: Example, root: Root, linear: LinearTree, branches: Sequence[Branch]) -> TokenizedExample:
    return TokenizedExample(
        uid=example.uid,
        input_ids=linear.input_ids,
        target_ids=linear.target_ids,
        loss_weights=linear.loss_weights,
        position_ids=linear.position_ids,
        subsegment_ids=linear.subsegment_ids,
        is_visual=linear.is_visual,
        crops=root.crops,
        pooling=root.pooling,
        tasks=tuple(branch.task for branch in branches),
    )
