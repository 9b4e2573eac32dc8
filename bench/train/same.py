#!/usr/bin/env python3
"""Do our training steps agree with PyTorch's? The same first weights, the same batch again and again, the same optimizer.

    bench/train/same.py [--steps 8] [NETWORK …]

Each network is exported from PyTorch with its first weights; both sides then train on one batch. Prints the
losses side by side, and how far both are from PyTorch's in 64 bits: rounding alone moves them apart. Needs PyTorch (`apt-get install python3-torch`); LIGHTER names the program.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy
import torch

import models

LIGHTER = os.environ.get("LIGHTER", str(pathlib.Path(__file__).resolve().parents[2] / "target" / "release" / "lighter"))


def theirs(name, steps, rate, dtype):
    network, (x, y) = models.make(name)
    network = network.to(dtype).train()
    x = x.to(dtype) if x.is_floating_point() else x
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = models.loss_of(network, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ours(name, steps, rate, folder, extra=()):
    model, data = folder / f"{name}.onnx", folder / f"{name}.npz"
    x, y = models.export(name, model)
    features = {"tokens" if x.dtype == torch.int64 else "image" if x.ndim == 4 else "features": x.numpy(), "label": y.numpy()}
    numpy.savez(data, **features)
    command = [LIGHTER, "train", model, "--data", data, "--json", "--quiet", "--normalise", "none", "--batch", x.shape[0], "--steps", steps,
               "--epochs", steps, "--optimizer", "sgd:momentum=0.9", "--lr", rate, "--validation", "0", "-o", folder / "out.onnx", *extra]
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{name}: exit code {run.returncode}\n{run.stderr}")
    return json.loads(run.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or list(models.NETWORKS):
            exact = theirs(name, arguments.steps, arguments.rate, torch.float64)
            a = theirs(name, arguments.steps, arguments.rate, torch.float32)
            b = ours(name, arguments.steps, arguments.rate, pathlib.Path(folder))["losses"]
            away = lambda x: max(abs(p - q) / abs(p) for p, q in zip(exact, x))
            print(f"{name}: largest relative distance from f64: PyTorch f32 {away(a):.1e}, lighter {away(b):.1e}")
            for what, losses in [("PyTorch f64", exact), ("PyTorch f32", a), ("lighter", b)]:
                print(f"  {what:12}", " ".join(f"{x:.5f}" for x in losses))


if __name__ == "__main__":
    main()
