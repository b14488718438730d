"""Serve an exported model with onnxruntime, PIL and numpy alone.

python serve_onnx.py best.onnx photo.jpg ...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, *paths = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
card = json.loads(session.get_modelmeta().custom_metadata_map["tidali"])
names = [one["name"] for one in card["classes"]]
size = card["input"]["width"], card["input"]["height"]


def pixels(path: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB of the model's input size. The model itself resizes to the network's size and normalises."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return np.asarray(image if image.size == size else ImageOps.fit(image, size, Image.Resampling.BICUBIC))


(probabilities,) = session.run(None, {"images": np.stack([pixels(path) for path in paths])})
for path, shares in zip(paths, probabilities, strict=True):
    best = shares.argmax()
    print(f"{path}: {names[best]} ({shares[best]:.1%})")
