"""infra/check.py: the manifests pass, and each kind of mistake that it is there for is found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from infra import check
from molmo2core.errors import EXIT_USER_CAN_MEND

Manifest = dict[str, Any]


@pytest.fixture
def manifests() -> list[Manifest]:
    return copy.deepcopy(check.base_manifests())


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def test_the_base_fits(manifests: list[Manifest]) -> None:
    kinds = {manifest["kind"] for manifest in manifests}
    assert {"Namespace", "Deployment", "Service", "Role", "RoleBinding", "ClusterTrainingRuntime"} <= kinds
    assert check.problems(manifests) == []


def test_the_workflow_may_run_trainjobs_and_read_logs_and_nothing_else(manifests: list[Manifest]) -> None:
    rules = {
        (group, resource): set(rule["verbs"])
        for rule in one(manifests, "Role", "molmo2-workflow")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert rules == {
        ("trainer.kubeflow.org", "trainjobs"): {"create", "get", "list", "watch", "delete"},
        ("", "pods"): {"get", "list"},
        ("", "pods/log"): {"get", "list"},
    }
    assert not [m for m in manifests if m["kind"].startswith("ClusterRole")]


def test_clients_reach_mlflow_by_a_name_that_it_answers_to(manifests: list[Manifest]) -> None:
    """MLflow answers 403 to a Host header that is not in --allowed-hosts, port included."""
    (container,) = one(manifests, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    (allowed,) = [argument for argument in container["args"] if argument.startswith("--allowed-hosts=")]
    used = {
        variable["value"].removeprefix("http://")
        for manifest in manifests
        for pod in check._pod_specs(manifest)
        for each in pod["containers"]
        for variable in each.get("env", ())
        if variable["name"] == "MLFLOW_TRACKING_URI"
    }
    assert used
    assert used <= set(allowed.removeprefix("--allowed-hosts=").split(","))


def test_a_fault_that_the_user_must_mend_ends_the_training(manifests: list[Manifest]) -> None:
    """The exit code in the runtime must be the one that molmo2core.errors uses, or jobs restart in vain."""
    jobset = one(manifests, "ClusterTrainingRuntime", "molmo2-torch")["spec"]["template"]["spec"]
    (rule,) = jobset["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [EXIT_USER_CAN_MEND])
    assert jobset["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def misspell_port(manifests: list[Manifest]) -> None:
    one(manifests, "Service", "mlflow")["spec"]["ports"][0]["targetport"] = "http"


def give_replicas_a_word(manifests: list[Manifest]) -> None:
    one(manifests, "Deployment", "mlflow")["spec"]["replicas"] = "one"


def use_a_removed_trainer_field(manifests: list[Manifest]) -> None:
    one(manifests, "ClusterTrainingRuntime", "molmo2-torch")["spec"]["mlPolicy"]["torch"]["numProcPerNode"] = 8


def misspell_deep_in_the_runtime(manifests: list[Manifest]) -> None:
    runtime = one(manifests, "ClusterTrainingRuntime", "molmo2-torch")
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    node["containers"][0]["volumeMount"] = node["containers"][0].pop("volumeMounts")


def give_the_runtime_a_wrong_type(manifests: list[Manifest]) -> None:
    one(manifests, "ClusterTrainingRuntime", "molmo2-torch")["spec"]["mlPolicy"]["numNodes"] = "two"


def take_a_moving_image(manifests: list[Manifest]) -> None:
    deployment = one(manifests, "Deployment", "object-store")
    deployment["spec"]["template"]["spec"]["containers"][0]["image"] = "docker.io/chrislusf/seaweedfs:latest"


def run_as_root(manifests: list[Manifest]) -> None:
    del one(manifests, "Deployment", "mlflow")["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]


def keep_a_secret(manifests: list[Manifest]) -> None:
    metadata = {"name": "object-store-credentials", "namespace": "molmo2"}
    manifests.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"a": "b"}})


def select_nothing(manifests: list[Manifest]) -> None:
    one(manifests, "Service", "mlflow")["spec"]["selector"] = {"app": "mlfow"}


def claim_nothing(manifests: list[Manifest]) -> None:
    volumes = one(manifests, "Deployment", "mlflow")["spec"]["template"]["spec"]["volumes"]
    volumes[0]["persistentVolumeClaim"]["claimName"] = "mlfow"


def bind_nobody(manifests: list[Manifest]) -> None:
    one(manifests, "RoleBinding", "molmo2-workflow")["subjects"][0]["name"] = "molmo3-workflow"


def put_a_cluster_wide_kind_into_a_namespace(manifests: list[Manifest]) -> None:
    one(manifests, "ClusterTrainingRuntime", "molmo2-torch")["metadata"]["namespace"] = "molmo2"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (misspell_port, "targetport"),
        (give_replicas_a_word, "spec.replicas: 'one' is not of type"),
        (use_a_removed_trainer_field, "mlPolicy.torch.numProcPerNode is no field of Kubeflow Trainer"),
        (misspell_deep_in_the_runtime, "volumeMount is no field of Kubeflow Trainer"),
        (give_the_runtime_a_wrong_type, "numNodes"),
        (take_a_moving_image, "neither pinned by digest"),
        (run_as_root, "runs as root"),
        (keep_a_secret, "secrets are made by hand"),
        (select_nothing, "selects no pod"),
        (claim_nothing, "no PersistentVolumeClaim mlfow"),
        (bind_nobody, "no ServiceAccount molmo3-workflow"),
        (put_a_cluster_wide_kind_into_a_namespace, "unless its kind belongs to the whole cluster"),
    ],
)
def test_a_mistake_is_found(manifests: list[Manifest], spoil: Callable[[list[Manifest]], None], message: str) -> None:
    spoil(manifests)
    found = check.problems(manifests)
    assert any(message in line for line in found), found
