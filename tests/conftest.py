"""What every test needs: a quiet, offline environment, an S3 endpoint, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

# Before any test module imports torch, tokenizers or mlflow, which read these once.
os.environ |= {
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` where torch sees no CUDA device; the summary counts them as deselected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server in this process (moto); boto3, streaming and MLflow find it through the environment."""
    from moto.server import ThreadedMotoServer

    from molmo2core import storage

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
            patch.setenv(name, endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        storage._client.cache_clear()
        yield endpoint
    storage._client.cache_clear()
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """`s3://` address of a fresh, empty bucket."""
    import boto3

    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"
