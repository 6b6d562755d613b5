"""A web service that answers an uploaded image: pip install 'eectl[serve]', then

EECTL_MODEL=model.safetensors EECTL_POLICY=policy.json EECTL_BUDGET=50 uvicorn serve:app --app-dir examples
curl -F image=@cat.jpg http://localhost:8000/predict
"""

import io
import os
from typing import Any

from fastapi import FastAPI, HTTPException, UploadFile
from PIL import Image, UnidentifiedImageError

import eectl

policy = os.environ.get("EECTL_POLICY")
budget = float(os.environ["EECTL_BUDGET"]) if "EECTL_BUDGET" in os.environ else None
model = eectl.load(os.environ.get("EECTL_MODEL", "model.safetensors"), policy=policy, budget=budget)
app = FastAPI(title="eectl")


@app.post("/predict")
def predict(image: UploadFile) -> dict[str, Any]:
    """Answer one image: its class, probability, exit and cost."""
    try:
        opened = Image.open(io.BytesIO(image.file.read()))
        return model.predict(opened)[0].to_json()
    except (UnidentifiedImageError, OSError, eectl.EectlError) as error:
        raise HTTPException(422, f"{image.filename}: {error}") from error


@app.get("/model")
def describe() -> dict[str, Any]:
    """Say what the network knows and what its exits cost."""
    return {"classes": model.classes, "exits": model.exits, "costs": model.costs, "budget": model.budget}
