"""`submit` with the real kfp.Client against a small fake of the server's REST API (kubeflow.md 3.1)."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from molmo2core.errors import RecipeError
from workflows.run import main
from workflows.submit import check_arguments, compile_pipeline

RECIPES = Path(__file__).parents[2] / "workflows" / "recipes"
LARGE = ["submit", "--recipe", str(RECIPES / "molmo2_4b.yaml")]


class FakeServer(ThreadingHTTPServer):
    """Knows health, experiments and runs; keeps what was posted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.posted: list[tuple[str, Any]] = []
        self.host = f"http://127.0.0.1:{self.server_port}"


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.answer(200, {"multi_user": False} if "healthz" in self.path else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posted.append((self.path, body))
        if self.path.endswith("/experiments"):
            return self.answer(200, {"experiment_id": "e-1", "display_name": body["display_name"]})
        return self.answer(200, {"run_id": "r-42", "display_name": body["display_name"], "experiment_id": "e-1"})

    def answer(self, status: int, content: Any) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()


def test_submit_sends_the_recipe_and_prints_the_address(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*LARGE, "--host", server.host, "--set", "train.sft.steps=5", "--workspace", "s3://mine/4b"])
    assert code == 0
    assert f"{server.host}/#/runs/details/r-42" in capsys.readouterr().out
    (experiments, experiment), (runs, run) = server.posted
    assert experiments.endswith("/experiments") and experiment["display_name"] == "molmo2-4b"
    assert runs.endswith("/runs") and run["experiment_id"] == "e-1" and run["display_name"] == "molmo2-4b"
    parameters = run["runtime_config"]["parameters"]
    assert parameters["recipe"] == (RECIPES / "molmo2_4b.yaml").read_text()
    assert parameters["overrides"] == ["train.sft.steps=5", 'workspace="s3://mine/4b"']
    assert "enableCache" in json.dumps(run["pipeline_spec"])


def test_no_cache_is_sent_for_every_task(server: FakeServer) -> None:
    assert main([*LARGE, "--host", server.host, "--no-cache"]) == 0
    assert "enableCache" not in json.dumps(server.posted[-1][1]["pipeline_spec"])


def test_wrong_recipe_sends_nothing(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LARGE, "--host", server.host, "--set", "seeed=1"]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err and server.posted == []


def test_local_workspace_is_refused_before_sending(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--recipe", str(RECIPES / "tiny.yaml"), "--host", server.host]) == 2
    assert "s3:// prefix" in capsys.readouterr().err and server.posted == []


def test_server_that_is_not_there_is_worth_a_retry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LARGE, "--host", "http://127.0.0.1:9"]) == 75
    assert "PlatformError: http://127.0.0.1:9" in capsys.readouterr().err


def test_missing_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_HOST", raising=False)
    assert main(LARGE) == 2
    assert "KFP_HOST" in capsys.readouterr().err


def test_unknown_and_missing_arguments_are_refused(tmp_path: Path) -> None:
    """The client accepts any name; only the server would complain, later."""
    spec = compile_pipeline(tmp_path / "ir.yaml")
    check_arguments(spec, {"recipe": "x"})
    with pytest.raises(RecipeError, match="unknown: recipes; missing: recipe"):
        check_arguments(spec, {"recipes": "x"})
