"""The five networks of the training benches in PyTorch, with names, shapes of a batch and exporters.

    python3 bench/train/models.py FOLDER    writes each as ONNX with its first weights, batch normalisations unfused
"""

import math
import pathlib
import sys

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (ResNet)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = None
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.short is None else self.short(x)))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 pictures: a 3x3 stem, no first pooling."""

    def __init__(self, classes=10, width=64):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage, outputs in enumerate([width, 2 * width, 4 * width, 8 * width]):
            blocks += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Inverted(nn.Module):
    """An inverted residual block (MobileNetV2)."""

    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        wide = inputs * expand
        layers = []
        if expand != 1:
            layers += [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.body = nn.Sequential(*layers)
        self.add = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.body(x)
        return x + y if self.add else y


class MobileNetV2(nn.Module):
    """MobileNetV2; for small pictures the first stages keep their resolution."""

    def __init__(self, classes=10, small=True):
        super().__init__()
        settings = [(1, 16, 1, 1), (6, 24, 2, 1 if small else 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
        layers = [nn.Conv2d(3, 32, 3, 1 if small else 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        inputs = 32
        for expand, outputs, count, stride in settings:
            for i in range(count):
                layers.append(Inverted(inputs, outputs, stride if i == 0 else 1, expand))
                inputs = outputs
        layers += [nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(1280, classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width, heads, length):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads
        self.register_buffer("mask", torch.full((1, 1, length, length), -1e9).triu(1))

    def forward(self, x):
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        p = torch.softmax(q @ k.transpose(2, 3) * (1.0 / math.sqrt(d // self.heads)) + self.mask, -1)
        return self.out((p @ v).transpose(1, 2).reshape(b, s, d))


class Layer(nn.Module):
    def __init__(self, width, heads, length):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, length)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder over characters: 6 layers of width 384."""

    def __init__(self, vocabulary=96, width=384, layers=6, heads=6, length=256):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.layers = nn.Sequential(*[Layer(width, heads, length) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.tokens(x) + self.places)))


class Lstm(nn.Module):
    """One LSTM layer over sequences of features, classified by its last state."""

    def __init__(self, features=40, hidden=128, classes=10):
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Cnn(nn.Module):
    """A small network for 28x28 grey pictures."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.head(x.mean((2, 3)))


def pictures(batch, size, channels=3):
    return torch.randn(batch, channels, size, size), torch.randint(0, 10, (batch,))


# name -> (network, batch of inputs and labels)
NETWORKS = {
    "resnet18-32-b32": (ResNet18, lambda: pictures(32, 32)),
    "mobilenetv2-32-b32": (MobileNetV2, lambda: pictures(32, 32)),
    "mobilenetv2-224-b8": (lambda: MobileNetV2(small=False), lambda: pictures(8, 224)),
    "transformer-6x384-s256-b8": (Transformer, lambda: (torch.randint(0, 96, (8, 256)), torch.randint(0, 96, (8, 256)))),
    "lstm-128-s64-b32": (Lstm, lambda: (torch.randn(32, 64, 40), torch.randint(0, 10, (32,)))),
    "cnn-28-b64": (Cnn, lambda: pictures(64, 28, 1)),
}


def make(name, seed=0):
    torch.manual_seed(seed)
    network, batch = NETWORKS[name]
    return network(), batch()


def loss_of(network, inputs, labels):
    outputs = network(inputs)
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def export(name, path, seed=0):
    network, (inputs, labels) = make(name, seed)
    network.eval()
    torch.onnx.export(
        network,
        inputs,
        str(path),
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        opset_version=14,
        input_names=["x"],
        output_names=["logits"],
    )
    return inputs, labels


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        export(name, folder / f"{name}.onnx")
        print(folder / f"{name}.onnx")
