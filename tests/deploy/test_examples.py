"""What lies in examples/ runs as it stands."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.process
def test_digits_from_training_to_answers(tmp_path):
    env = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    line = [sys.executable, EXAMPLES / "digits.py", tmp_path]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left at exit") == 10 and "budget 50 %: accuracy" in done.stdout and "mean cost" in done.stdout
    assert (tmp_path / "policy.json").exists() and (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture
def service(digits, monkeypatch):
    """The service's module, loaded with the digits' network, and a client of it."""
    pytest.importorskip("multipart", reason="the service needs python-multipart")
    client = pytest.importorskip("fastapi.testclient", reason="the service needs fastapi and httpx")
    monkeypatch.setenv("EECTL_MODEL", str(digits.checkpoint))
    monkeypatch.setenv("EECTL_POLICY", str(digits.policy))
    monkeypatch.setenv("EECTL_BUDGET", "60")
    spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, client.TestClient(module.app)


def test_the_service_answers_an_uploaded_image(service, digit_rows):
    module, client = service
    for row in range(3):
        file = io.BytesIO()
        Image.fromarray(digit_rows.pixels[row]).save(file, format="PNG")
        answer = client.post("/predict", files={"image": ("digit.png", file.getvalue(), "image/png")})
        assert answer.status_code == 200
        assert answer.json() == module.model.predict(digit_rows.pixels[row])[0].to_json()
    refused = client.post("/predict", files={"image": ("notes.txt", b"no image", "text/plain")})
    assert refused.status_code == 422 and "notes.txt" in refused.json()["detail"]
    deep = io.BytesIO()
    Image.new("F", (8, 8)).save(deep, format="TIFF")
    refused = client.post("/predict", files={"image": ("deep.tiff", deep.getvalue(), "image/tiff")})
    assert refused.status_code == 422 and "deep.tiff" in refused.json()["detail"] and "8" in refused.json()["detail"]
    assert client.get("/model").json()["classes"] == list("0123456789")
    assert len((EXAMPLES / "serve.py").read_text().splitlines()) < 40
