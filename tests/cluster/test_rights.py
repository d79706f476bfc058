"""Who may do what: the table of docs/cluster.md, asked of the API server's own authorizer."""

from __future__ import annotations

import pytest
from place import RELEASE, Place

TRAINJOBS, RUNTIMES = "trainjobs.trainer.kubeflow.org", "trainingruntimes.trainer.kubeflow.org"
RESULTS, QUEUES = "workflowtaskresults.argoproj.io", "localqueues.kueue.x-k8s.io"
DEPLOYMENTS, ROLES, BINDINGS = "deployments.apps", "roles.rbac.authorization.k8s.io", "rolebindings.rbac.authorization.k8s.io"  # fmt: skip
ACCOUNTS = ("pipelines", "training", "promoter", "bootstrap", "mlflow", "captioner")
Right = tuple[str, str, str]  # verb, resource[.group][/part], name or ""

# Everything that each account may do; an account that is not here may do nothing.
ALLOWED: dict[str, set[Right]] = {
    "pipelines": {
        *((verb, RESULTS, "") for verb in ("create", "patch")),
        *(("get", "configmaps", name) for name in ("vlmflow", "kfp-launcher")),
        *(("get", "secrets", name) for name in ("vlmflow-store", "mlpipeline-minio-artifact")),
        *((verb, "pods", "") for verb in ("get", "list", "watch")),
        *((verb, f"{kind}", "") for kind in ("pods/log", "events") for verb in ("get", "list", "watch")),
        *((verb, TRAINJOBS, "") for verb in ("create", "get", "list", "watch", "patch", "delete")),
        *((verb, RUNTIMES, "") for verb in ("get", "list", "watch")),
        ("get", QUEUES, ""),
    },
    "promoter": {("get", DEPLOYMENTS, "points-serving"), ("patch", DEPLOYMENTS, "points-serving")},
}
VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
KINDS = (
    "pods", "pods/log", "pods/exec", "pods/attach", "pods/portforward", "pods/ephemeralcontainers", "events",
    "secrets", "configmaps", "services", "serviceaccounts", "serviceaccounts/token", "persistentvolumeclaims",
    DEPLOYMENTS, "deployments.apps/scale", "statefulsets.apps", "jobs.batch", ROLES, BINDINGS, TRAINJOBS, RUNTIMES,
    RESULTS, QUEUES,
)  # fmt: skip
NAMES = {
    "secrets": ("", "vlmflow-store", "mlpipeline-minio-artifact", "vlmflow-promoter", "vlmflow-mlflow-admin"),
    "configmaps": ("", "vlmflow", "kfp-launcher", "other"),
    DEPLOYMENTS: ("", "points-serving", "vlmflow-promoter", "other"),
}
CLUSTER = ("nodes", "namespaces", "persistentvolumes", "clusterroles.rbac.authorization.k8s.io", "clusterrolebindings.rbac.authorization.k8s.io", "customresourcedefinitions.apiextensions.k8s.io")  # fmt: skip


def may(production: Place, account: str, right: Right, namespace: str) -> bool:
    """One SubjectAccessReview; `namespace` "" = the cluster's own kinds."""
    verb, what, name = right
    kind, _, part = what.partition("/")
    plural, _, group = kind.partition(".")
    asked = {"verb": verb, "group": group, "resource": plural, "subresource": part, "name": name, "namespace": namespace}  # fmt: skip
    user = f"system:serviceaccount:{production.namespace}:{RELEASE}-{account}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{production.namespace}", "system:authenticated"]
    review = {"spec": {"user": user, "groups": groups, "resourceAttributes": asked}}
    answer = production.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return answer["status"]["allowed"]


@pytest.mark.parametrize("account", ACCOUNTS)
def test_an_account_may_do_what_the_table_says_and_nothing_else(production: Place, account: str) -> None:
    asked = [(verb, kind, name) for kind in KINDS for name in NAMES.get(kind, ("",)) for verb in VERBS]
    given = {right for right in asked if may(production, account, right, production.namespace)}
    assert given == ALLOWED.get(account, set())


@pytest.mark.parametrize("account", ACCOUNTS)
def test_no_account_may_do_anything_elsewhere(production: Place, account: str) -> None:
    rights = ALLOWED.get(account, set()) | {("list", "secrets", ""), ("create", "pods", "")}
    assert not [right for right in rights if may(production, account, right, "kube-system")]
    assert not [(verb, kind) for kind in CLUSTER for verb in VERBS if may(production, account, (verb, kind, ""), "")]


def test_a_token_meets_the_same_refusals(production: Place) -> None:
    """Not only the reviews: requests with an account's own token."""
    from kubernetes.client.exceptions import ApiException

    token = production.plane.account_token(production.namespace, f"{RELEASE}-pipelines")
    base = f"/api/v1/namespaces/{production.namespace}"
    assert production.get(f"{base}/configmaps/vlmflow", token)["data"]["trainLauncher"] == "trainjob"
    assert set(production.get(f"{base}/secrets/vlmflow-store", token)["data"]) == {"accesskey", "secretkey"}
    for path in (f"{base}/secrets", f"{base}/secrets/vlmflow-promoter", "/api/v1/namespaces/kube-system/pods", "/api/v1/nodes"):  # fmt: skip
        with pytest.raises(ApiException) as refused:
            production.get(path, token)
        assert refused.value.status == 403, path
