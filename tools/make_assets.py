#!/usr/bin/env python3
"""Makes assets/coffee.jpg and prints what onnxruntime answers on it with the embedded default model.

    pip install numpy onnxruntime pillow
    tools/make_assets.py

The photograph is coffee.png of the PyPI package scikit-image==0.22.0, CC0 by its photographer, Rachel Michetti,
courtesy of Pikolo Espresso Bar; it is scaled to 320x213 and compressed.
The model is mobilenet_v1_0.75_192_quant.tflite of google-coral's test data (Apache-2.0), converted once by
    python -m tf2onnx.convert --tflite mobilenet_v1_0.75_192_quant.tflite --output mobilenet_v1_0.75_192_quant.onnx --opset 13
and kept as it came out; its weights are unchanged.
"""

import io
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import onnxruntime
from PIL import Image

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"


def main():
    picture = ASSETS / "coffee.jpg"
    if not picture.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "scikit-image==0.22.0"]
            subprocess.run(command, check=True)
            (wheel,) = pathlib.Path(folder).glob("*.whl")
            original = zipfile.ZipFile(wheel).read("skimage/data/coffee.png")
        image = Image.open(io.BytesIO(original)).convert("RGB").resize((320, 213), Image.LANCZOS)
        image.save(picture, quality=88, optimize=True)
    labels = (ASSETS / "imagenet_labels.txt").read_text().splitlines()
    session = onnxruntime.InferenceSession(ASSETS / "mobilenet_v1_0.75_192_quant.onnx")
    pixels = np.asarray(Image.open(picture).convert("RGB").resize((192, 192), Image.BILINEAR), np.uint8)[None]
    scores = session.run(None, {"input": pixels})[0][0].astype(int)
    for index in np.argsort(-scores, kind="stable")[:5]:
        print(f"| {index} | {labels[index]} | {scores[index]} | {scores[index] / 256:.3f} |")


if __name__ == "__main__":
    main()
