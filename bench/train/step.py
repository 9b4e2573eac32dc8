#!/usr/bin/env python3
"""Time and memory of a training step beside PyTorch's, interleaved, each measurement in a process of its own.

    bench/train/step.py [--rounds 3] [--steps 8] [--threads 2] [NETWORK …]

Both sides take the same first weights, the same batch again and again, and SGD with momentum; `same.py` shows that they
compute the same. The time is the median over the steps of a process but the first two, then the median over the rounds;
memory is the kernel's peak (VmHWM) less what the process held before it had a network (PyTorch imported; the fixed cost of
lighter). Needs PyTorch (`apt-get install python3-torch libopenblas0-pthread`). Writes bench/results/train-step.json.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import models
import same

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results" / "train-step.json"


def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) * 1024


def child(name, steps, threads):
    before = status("VmRSS")
    torch.set_num_threads(threads)
    network, (x, y) = models.make(name)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        models.loss_of(network, x, y).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(times[2:]), "peak": status("VmHWM") - before}))


def theirs(name, steps, threads):
    command = [sys.executable, "-W", "ignore", __file__, "--child", name, "--steps", str(steps), "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def ours(name, steps, threads, folder):
    report = same.ours(name, steps, 0.01, folder, ["--threads", threads])
    return {
        "seconds": report["step_seconds_median"],
        "peak": report["peak_resident_bytes"] - report["fixed_bytes"],
        "planned": report["predicted_peak_bytes"],
        "predicted": report["predicted_step_seconds"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.steps, arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or list(models.NETWORKS):
            a, b = [], []
            for _ in range(arguments.rounds):
                a.append(theirs(name, arguments.steps, arguments.threads))
                b.append(ours(name, arguments.steps, arguments.threads, pathlib.Path(folder)))
            middle = lambda runs, key: statistics.median(r[key] for r in runs)
            row = {
                "network": name,
                "pytorch_ms": middle(a, "seconds") * 1e3,
                "lighter_ms": middle(b, "seconds") * 1e3,
                "speed": middle(a, "seconds") / middle(b, "seconds"),
                "pytorch_mib": middle(a, "peak") / 2**20,
                "lighter_mib": middle(b, "peak") / 2**20,
                "memory": middle(b, "peak") / middle(a, "peak"),
                "planned_mib": middle(b, "planned") / 2**20,
                "predicted_ms": middle(b, "predicted") * 1e3,
            }
            rows.append(row)
            print(
                "{network:28} speed {speed:5.2f} x ({lighter_ms:7.1f} ms, PyTorch {pytorch_ms:7.1f}, predicted {predicted_ms:7.1f})"
                "  memory {memory:4.2f} x ({lighter_mib:6.1f} MiB, PyTorch {pytorch_mib:6.1f}, planned {planned_mib:6.1f})".format(**row),
                flush=True,
            )
    result = {
        "schema": "lightering.bench.train-step/1",
        "date": time.strftime("%Y-%m-%d"),
        "pytorch": torch.__version__,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "cpu": next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
