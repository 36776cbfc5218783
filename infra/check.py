"""Check the Kubernetes manifests without a cluster: `python -m infra.check`.

1. Every field exists and has its type: built-in kinds against Kubernetes' own schemas (kubernetes-validate, strict),
   ClusterTrainingRuntime against Kubeflow Trainer's models (kubeflow-trainer-api) and its pod against Kubernetes'.
2. What a schema cannot know: images pinned or our own, no secret values, no root, and names that lead somewhere.

The base is read as written; overlays are rendered by `kubectl kustomize` where there is a kubectl.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1ClusterTrainingRuntime
from pydantic import ValidationError

from components.images import IMAGES

INFRA = Path(__file__).parent
KUBERNETES_VERSION = "1.33"
CLUSTER_SCOPED = ("Namespace", "ClusterTrainingRuntime")
Manifest = dict[str, Any]


def base_manifests() -> list[Manifest]:
    """All documents of base/, in the order of its kustomization."""
    base = INFRA / "base"
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in base.glob("*.yaml") if path.name != "kustomization.yaml")
    return [document for name in listed for document in yaml.safe_load_all((base / name).read_text())]


def rendered_manifests(overlay: Path) -> list[Manifest] | None:
    """All documents of an overlay; None without kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return None
    run = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(run.stdout))


def problems(manifests: list[Manifest]) -> list[str]:
    """Everything that is wrong, one line each; empty when all is well."""
    found = [f"{_name(manifest)}: {line}" for manifest in manifests for line in _manifest_problems(manifest)]
    return found + list(_broken_names(manifests))


def _name(manifest: Manifest) -> str:
    return f"{manifest.get('kind')} {manifest.get('metadata', {}).get('name')}"


def _manifest_problems(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] == "ClusterTrainingRuntime":
        yield from _runtime_problems(manifest)
    else:
        yield from _schema_problems(manifest)
    if manifest["kind"] == "Secret":
        yield "secrets are made by hand (README.md), never kept in the repository"
    if ("namespace" in manifest["metadata"]) == (manifest["kind"] in CLUSTER_SCOPED):
        yield "wants a namespace, unless its kind belongs to the whole cluster"
    for pod in _pod_specs(manifest):
        yield from _pod_problems(pod)


def _schema_problems(manifest: Manifest) -> Iterator[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(str(part) for part in error.path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message


def _runtime_problems(manifest: Manifest) -> Iterator[str]:
    try:
        understood = TrainerV1alpha1ClusterTrainingRuntime.from_dict(manifest)
    except ValidationError as error:
        yield str(error)
        return
    yield from _dropped(manifest, understood.to_dict(), "")
    for pod in _pod_specs(manifest):
        named = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": pod}
        yield from _schema_problems(named)


def _dropped(written: object, understood: object, path: str) -> Iterator[str]:
    """Fields that the models do not know: a server prunes them without a word."""
    if isinstance(written, dict) and isinstance(understood, dict):
        for key, value in written.items():
            if key in understood:
                yield from _dropped(value, understood[key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is no field of Kubeflow Trainer"
    elif isinstance(written, list) and isinstance(understood, list):
        for number, (left, right) in enumerate(zip(written, understood, strict=True)):
            yield from _dropped(left, right, f"{path}[{number}]")


def _pod_specs(node: object) -> Iterator[Manifest]:
    """Every object with containers, however deep."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from _pod_specs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _pod_specs(value)


def _pod_problems(pod: Manifest) -> Iterator[str]:
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield "runs as root"
    if pod.get("automountServiceAccountToken") is not False:
        yield "is given a token for the Kubernetes API, which no container here uses"
    for container in pod["containers"]:
        image = container.get("image", "")
        if "@sha256:" not in image and image not in IMAGES.values():
            yield f"image {image!r} is neither pinned by digest nor one of components/images.py"
        if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            yield f"container {container['name']} may escalate its privileges"


def _broken_names(manifests: list[Manifest]) -> Iterator[str]:
    labels = [m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] == "Deployment"]
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for manifest in manifests:
        spec, kind = manifest.get("spec", {}), manifest["kind"]
        selector = spec.get("selector") if kind == "Service" else spec.get("podSelector", {}).get("matchLabels")
        if kind in ("Service", "NetworkPolicy") and not any(selector.items() <= pod.items() for pod in labels):
            yield f"{_name(manifest)}: selects no pod of a Deployment ({selector})"
        for pod in _pod_specs(manifest):
            claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod.get("volumes", ())]
            for claim in filter(None, claims):
                if ("PersistentVolumeClaim", claim) not in names:
                    yield f"{_name(manifest)}: there is no PersistentVolumeClaim {claim}"
        if kind == "RoleBinding":
            for bound in (manifest["roleRef"], *manifest["subjects"]):
                if (bound["kind"], bound["name"]) not in names:
                    yield f"{_name(manifest)}: there is no {bound['kind']} {bound['name']}"


def main() -> int:
    """Print what is wrong; 0 when nothing is."""
    wrong = [f"base: {line}" for line in problems(base_manifests())]
    for overlay in sorted(path.parent for path in INFRA.glob("overlays/*/kustomization.yaml")):
        rendered = rendered_manifests(overlay)
        if rendered is None:
            print(f"infra: {overlay.name} not rendered, there is no kubectl here")
        else:
            wrong += [f"{overlay.name}: {line}" for line in problems(rendered)]
    print("\n".join(wrong) if wrong else "infra: every manifest fits its schema")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
