"""Serve an exported model with onnxruntime, PIL and numpy alone; the pixels are made as `tidali predict` makes them.

python serve_onnx.py best.onnx photo.jpg ...
"""

import json
import math
import os
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, *paths = sys.argv[1:]
onnxruntime.set_default_logger_severity(3)  # errors
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = len(os.sched_getaffinity(0))  # by default it pins threads to cores that a container may lack
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
card = json.loads(session.get_modelmeta().custom_metadata_map["tidali"])
names = [one["name"] for one in card["classes"]]
size = card["input"]["height"], card["input"]["width"]


def resize_matrix(size: tuple[int, int], axis: int) -> np.ndarray:
    """(res, size[axis]): what brings an axis of an image to the network's input. The shorter side becomes res / crop_fraction
    pixels and the centre is kept; bicubic, antialiased, with the border pixel repeated beyond the image."""
    res, a = card["res"], {"pil": -0.5, "opencv": -0.75}[card["kernel"]]
    scale = min(size) * card.get("crop_fraction", 1.0) / res
    resized = int(size[axis] / scale + 0.5)
    start = (size[axis] - resized * scale) / 2 + math.ceil((resized - res) / 2) * scale
    stretch = max(scale, 1.0)
    centres = start + (np.arange(res)[:, None] + 0.5) * scale - 0.5
    columns = np.floor(centres - 2 * stretch) + 1 + np.arange(2 * math.ceil(2 * stretch))
    x = abs(columns - centres) / stretch
    far = np.where(x < 2, a * (((x - 5) * x + 8) * x - 4), 0)
    weights = np.where(x <= 1, ((a + 2) * x - (a + 3)) * x * x + 1, far)
    matrix = np.zeros((res, size[axis]))
    rows = np.broadcast_to(np.arange(res)[:, None], columns.shape)
    np.add.at(matrix, (rows, columns.clip(0, size[axis] - 1).astype(int)), weights / weights.sum(1, keepdims=True))
    return matrix


def apply(rows: np.ndarray, columns: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)


def pixels_of(path: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB of the model's input size. The model resizes them to the network's size and normalises them, which is
    right for images of the size that it was trained on. Others are resized here once, straight from their own pixels, and the
    model is given those pixels that its own resize turns into that result."""
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    if pixels.shape[:2] == size:
        return pixels
    own = [resize_matrix(size, axis) for axis in (0, 1)]
    if any(np.linalg.matrix_rank(matrix, 0.1 * np.linalg.norm(matrix, 2)) < card["res"] for matrix in own):
        natural = round(card["res"] / card.get("crop_fraction", 1.0))
        sys.exit(f"{path}: the model enlarges its input of {size[1]} x {size[0]} px; export it with --input-size {natural}")
    seen = apply(*(resize_matrix(pixels.shape[:2], axis) for axis in (0, 1)), pixels).clip(0, 255)
    return apply(*map(np.linalg.pinv, own), seen).round().clip(0, 255).astype(np.uint8)


(probabilities,) = session.run(None, {"images": np.stack([pixels_of(path) for path in paths])})
for path, shares in zip(paths, probabilities, strict=True):
    best = shares.argmax()
    print(f"{path}: {names[best]} ({shares[best]:.1%})")
