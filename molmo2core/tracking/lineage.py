"""What a model was made from, read from its last reference alone: works also for steps served from a cache."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2core.references import (
    CheckpointRef,
    EvaluationRef,
    ExportRef,
    ManifestsRef,
    ModelVersionRef,
    PackPlanRef,
    Reference,
    ShardsRef,
)

_SHOWN_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class DatasetUse:
    """One dataset and what it was used for."""

    name: str
    digest: str
    uri: str
    context: str
    """`training` or `evaluation`."""
    samples: dict[str, int]


def datasets_of(evaluation: EvaluationRef) -> list[DatasetUse]:
    """Datasets that the evaluated model was trained on, then those that it was evaluated on.

    The latter are named `<dataset>.held-out`: MLflow keeps one context per dataset and run, and the shards of one
    dataset hold all its splits.
    """
    plans = [ref for ref in evaluation.ancestors() if isinstance(ref, PackPlanRef)]
    trained = {ref.digest: ref for plan in plans for ref in plan.ancestors() if isinstance(ref, ShardsRef)}
    evaluated = [ref for ref in evaluation.parents if isinstance(ref, ShardsRef)]
    return [
        DatasetUse(name=name, digest=ref.digest, uri=ref.uri, context=context, samples=ref.num_samples)
        for context, refs, suffix in (("training", trained.values(), ""), ("evaluation", evaluated, ".held-out"))
        for ref in sorted(refs, key=lambda ref: ref.dataset)
        for name in [f"{ref.dataset}{suffix}"]
    ]


def checkpoints_of(reference: Reference) -> list[CheckpointRef]:
    """Checkpoints behind `reference`, in order of training."""
    return [ref for ref in reference.ancestors() if isinstance(ref, CheckpointRef)][::-1]


def lineage_text(reference: Reference) -> str:
    """An indented tree, newest first; what was shown before is only named."""
    lines: list[str] = []
    shown: set[str] = set()

    def show(ref: Reference, depth: int) -> None:
        again = " (see above)" if ref.digest in shown and ref.parents else ""
        lines.append(f"{'  ' * depth}{_title(ref)}  {ref.digest[:_SHOWN_DIGITS]}  {ref.uri}{again}")
        if ref.digest not in shown:
            shown.add(ref.digest)
            for parent in ref.parents:
                show(parent, depth + 1)

    show(reference, 0)
    return "\n".join(lines) + "\n"


def lineage_mermaid(reference: Reference) -> str:
    """The same as a Mermaid flow chart, oldest on the left."""
    nodes = {ref.digest: f"n{number}" for number, ref in enumerate(reference.ancestors())}
    lines = ["flowchart LR"]
    for ref in reference.ancestors():
        label = f"{_title(ref)}<br/>{ref.digest[:_SHOWN_DIGITS]}".replace('"', "'")
        lines.append(f'  {nodes[ref.digest]}["{label}"]')
    for ref in reference.ancestors():
        lines.extend(f"  {nodes[parent.digest]} --> {nodes[ref.digest]}" for parent in ref.parents)
    return "\n".join(lines) + "\n"


def _title(ref: Reference) -> str:
    match ref:
        case ManifestsRef():
            return f"validated manifests ({', '.join(ref.datasets)})"
        case ShardsRef():
            return f"shards of {ref.dataset}"
        case PackPlanRef():
            return f"pack plan of {ref.stage}, {ref.num_packs} packs"
        case CheckpointRef():
            changed = ref.facts.get("data_changed_at_step")
            return f"checkpoint of {ref.stage}, step {ref.step}" + (
                f", data changed at step {changed:.0f}" if changed is not None else ""
            )
        case ExportRef():
            return "export"
        case EvaluationRef():
            return f"evaluation, {'passed' if ref.passed else 'refused'}"
        case ModelVersionRef():
            return f"model {ref.name} version {ref.version}"
    return type(ref).__name__
