#!/usr/bin/env python3
"""Writes crates/kernels/tests/golden/blocks.txt: blocks of weights and what they decode to, rows and what they encode to.

Source of truth: gguf.quants of the PyPI package gguf (MIT, from llama.cpp); run with `pip install gguf==0.19.0`.
One line a case: decode|encode FORMAT BYTES FLOATS, the bytes in hexadecimal, the floats as their little-endian bytes.
"""

import pathlib

import numpy as np
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

FORMATS = "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL MXFP4".split()
ENCODED = "BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0".split()
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q6_K": (208,), "MXFP4": (), "F16": (), "BF16": ()}

random = np.random.default_rng(7)
lines = []
for name in FORMATS:
    kind = GGMLQuantizationType[name]
    length, size = GGML_QUANT_SIZES[kind]
    blocks = 1 if length == 256 else 2 if length == 32 else 8
    data = random.integers(0, 256, (blocks, size), dtype=np.uint8)
    for at in SCALES.get(name, (0,)):
        data[:, at : at + 2] = random.normal(0, 0.1, (blocks, 1)).astype(np.float16).view(np.uint8)
    if name == "F16":
        data = random.normal(0, 1, (1, blocks)).astype(np.float16).view(np.uint8)
    if name == "BF16":
        data = quants.quantize(random.normal(0, 1, (1, blocks)).astype(np.float32), kind).view(np.uint8)
    decoded = quants.dequantize(data.reshape(1, -1), kind).astype(np.float32)
    lines.append(f"decode {name} {data.tobytes().hex()} {decoded.tobytes().hex()}")
for name in ENCODED:
    x = random.normal(0, 1, (1, 64)).astype(np.float32)
    data = quants.quantize(x, GGMLQuantizationType[name])
    lines.append(f"encode {name} {data.tobytes().hex()} {x.tobytes().hex()}")
target = pathlib.Path(__file__).resolve().parent.parent / "crates/kernels/tests/golden/blocks.txt"
target.write_text("\n".join(lines) + "\n")
