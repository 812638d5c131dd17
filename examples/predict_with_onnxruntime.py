"""Predict with an exported ONNX file alone: `python predict_with_onnxruntime.py FILE IMAGE...`.

Neither fastres nor torch is needed. The file's metadata has the classes, the normalisation and the size of an image.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
data = json.loads(session.get_modelmeta().custom_metadata_map["fastres"])["data"]
size = data["image_size"]
zoom = 256 / 224 if data["resize"] else 1.0  # trained with resized_crop: the centre of a larger image

for path in sys.argv[2:]:
    image = Image.open(path).convert("RGB" if data["channels"] == 3 else "L")
    scale = size * zoom / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32).reshape(size, size, -1) / 255
    x = (pixels - np.float32(data["mean"])) / np.float32(data["std"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.transpose(2, 0, 1)[None]})
    shares = np.exp(logits[0] - logits[0].max())[: len(data["classes"])]
    best = shares.argmax()
    print(f"{path},{data['classes'][best]},{shares[best] / shares.sum():.6f}")
