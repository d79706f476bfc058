"""What every task of every pipeline gets from the platform: configuration, credentials, security, retries, caching.

Endpoints come from the ConfigMap `vlmflow`, credentials from Secrets; neither ever is a pipeline parameter, because KFP
stores parameters and copies them to MLflow. On a laptop kfp.local ignores all of it and tasks inherit the environment.
"""

from kfp import kubernetes
from kfp.dsl import PipelineTask

CONFIG_MAP = "vlmflow"
CONFIG = {
    "root": "VLMFLOW_ROOT",
    "s3Endpoint": "VLMFLOW_S3_ENDPOINT",
    "s3Region": "AWS_REGION",
    "mlflowTrackingUri": "MLFLOW_TRACKING_URI",
    "captionUrl": "VLMFLOW_CAPTION_URL",
    "fuseUrl": "VLMFLOW_FUSE_URL",
    "trainLauncher": "VLMFLOW_TRAIN_LAUNCHER",
    "trainJob": "VLMFLOW_TRAINJOB_CONFIG",
    "promotionPolicies": "VLMFLOW_PROMOTION_POLICIES",
}
# Kubeflow labels every pod of a run with its id; without it all runs would share one folder of timings and reports.
RUN_LABEL = "metadata.labels['pipeline/runid']"
# The secret that KFP itself keeps its object store's key pair in.
STORE_SECRET = "mlpipeline-minio-artifact"
STORE_KEYS = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
# API keys of caption and fusion endpoints, for those who use them.
ENDPOINT_SECRET = "vlmflow-endpoints"
ENDPOINT_KEYS = {"captionKey": "VLMFLOW_CAPTION_KEY", "fuseKey": "VLMFLOW_FUSE_KEY"}
# Logins of MLflow where it asks for one: who trains may write NAME-candidates, who promotes NAME (platform.md 4.3).
MLFLOW_SECRET, PROMOTER_SECRET = "vlmflow-mlflow", "vlmflow-promoter"
MLFLOW_KEYS = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}


def _platform(task: PipelineTask, login: str = MLFLOW_SECRET) -> PipelineTask:
    for key, variable in CONFIG.items():
        kubernetes.use_config_map_as_env(task, CONFIG_MAP, {key: variable}, optional=True)
    kubernetes.use_secret_as_env(task, STORE_SECRET, STORE_KEYS, optional=True)
    kubernetes.use_secret_as_env(task, ENDPOINT_SECRET, ENDPOINT_KEYS, optional=True)
    kubernetes.use_secret_as_env(task, login, MLFLOW_KEYS, optional=True)
    kubernetes.use_field_path_as_env(task, "VLMFLOW_RUN_ID", RUN_LABEL)
    kubernetes.set_security_context(task, run_as_non_root=True)
    # PyTorch's workers share memory through /dev/shm, 64 MiB in a plain container.
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory")
    return task


def repeatable(task: PipelineTask) -> PipelineTask:
    """A task whose outputs are found again by digest: KFP may cache it and retries it with growing pauses."""
    return _retried(_platform(task))


def once(task: PipelineTask) -> PipelineTask:
    """A task that looks at the world as it is now (stores, registry, scores): never cached; retried all the same,
    because the library finds what an earlier attempt finished."""
    return repeatable(task).set_caching_options(enable_caching=False)


def privileged(task: PipelineTask) -> PipelineTask:
    """`once`, with the only login that may write the production model."""
    return _retried(_platform(task, PROMOTER_SECRET)).set_caching_options(enable_caching=False)


def _retried(task: PipelineTask) -> PipelineTask:
    return task.set_retry(num_retries=2, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="300s")
