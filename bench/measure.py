"""What the bench scripts share: the machine, the models, and one process of one engine."""

import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import numpy as np

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
DATA = pathlib.Path(os.environ.get("LIGHTER_TEST_DATA", "~/.cache/lighter-test-data")).expanduser()
PEERS = REPOSITORY / "bench" / "peers" / "target" / "release"
LIGHTER = pathlib.Path(os.environ.get("LIGHTER", REPOSITORY / "target" / "release" / "lighter"))
SIBLINGS = pathlib.Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
# The order of the tables.
MODELS = ("efficientnet-lite0", "mobilenet-v2", "mobilenet-v3-small", "resnet-18", "resnet-50", "squeezenet-1.1",
          "vit-tiny", "minilm-l6", "mobilenet_v2_quant", "nanodet-coco-416")
# Engines behind a program with the options of bench/peers (see its README).
PROGRAMS = {
    "onnxruntime": [sys.executable, str(REPOSITORY / "bench" / "peers" / "peer_onnxruntime.py")],
    "rten": [str(PEERS / "peer-rten")],
    "tract": [str(PEERS / "peer-tract")],
}


def text(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu_list(text):
    """The CPUs of a kernel list such as "0-1,4"."""
    found = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def machine():
    """The kind of machine, never its name."""
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    field = lambda key: (re.search(rf"^{key}\s*: (.*)$", cpu, re.M) or [None, "unknown"])[1]
    flags = field("flags").split()
    memory = int(re.search(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) * 1024
    return {
        "cpu": field("model name"), "cpu_family_model": f"{field('cpu family')}/{field('model')}",
        "cores": os.cpu_count(), "threads_per_core": len(cpu_list(SIBLINGS.read_text())) if SIBLINGS.exists() else None, "isa": [f for f in ISA if f in flags], "memory_bytes": memory,
        "kernel": platform.release().split("-")[0], "load_average_at_start": os.getloadavg()[0],
    }


def heading(command):
    """The first fields of every result file."""
    dirty = bool(text(["git", "status", "--porcelain", "--untracked-files=no", "--", "crates", "Cargo.lock"]))
    return {
        "schema": 1, "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": text(["git", "rev-parse", "--short=12", "HEAD"]) + ("+changes" if dirty else ""),
        "command": command, "machine": machine(),
    }


def model_path(model):
    return DATA / "models" / f"{model}.onnx"


def bound_inputs(model):
    """The model's inputs as (name, .npy file)."""
    folder = DATA / "expected" / model
    names = json.loads((folder / "names.json").read_text())
    return [(name, folder / f"input_{index}.npy") for index, name in enumerate(names["inputs"])]


def output_names(model):
    return json.loads((DATA / "expected" / model / "names.json").read_text())["outputs"]


def available(models):
    """Those of `models` whose file and inputs are there; says which are not."""
    found = []
    for model in models:
        if model_path(model).exists() and (DATA / "expected" / model / "names.json").exists():
            found.append(model)
        else:
            print(f"{model}: skipped, no model or inputs under {DATA}; run tools/make_bench_models.py and "
                  "tools/make_expected.py", file=sys.stderr)
    return found


def run_peer(engine, model, threads, warmup, runs, output_dir, timeout=600):
    """One process of a peer. Returns its report, or {"error": …}."""
    command = [*PROGRAMS[engine], "latency", str(model_path(model)), "--threads", str(threads), "--warmup", str(warmup),
               "--runs", str(runs), "--output-dir", str(output_dir)]
    for name, file in bound_inputs(model):
        command += ["--input", f"{name}={file}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {timeout} s"}
    except OSError as error:
        return {"error": str(error)}
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": (lines or [f"exit code {done.returncode}"])[0][:300]}
    report = json.loads(done.stdout.splitlines()[-1])
    # Files are numbered in the graph's order; the names in JSON need not be.
    files = sorted(report["outputs"].values(), key=lambda file: int(pathlib.Path(file).stem))
    report["outputs"] = [np.load(file) for file in files]
    return report


def relative_error(got, expected):
    """Largest difference over all outputs, each relative to the largest magnitude in that output."""
    if len(got) != len(expected):
        return float("inf")
    worst = 0.0
    for g, e in zip(got, expected):
        if g.shape != e.shape:
            return float("inf")
        g, e = g.astype(np.float64), e.astype(np.float64)
        if not np.isfinite(g).all():
            return float("inf")
        worst = max(worst, float(np.abs(g - e).max(initial=0.0) / max(np.abs(e).max(initial=0.0), 1e-30)))
    return worst


def write_result(name, result):
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.relative_to(REPOSITORY)}", file=sys.stderr)
