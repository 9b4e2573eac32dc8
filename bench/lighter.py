"""`lighter` under measurement: its fixed command line (`lighter run`, `lighter bench`, `lighter doctor`) and its receipt."""

import functools
import json
import os
import pathlib
import subprocess
import tempfile
import time

import measure
import numpy as np


@functools.cache
def version():
    return measure.text([str(measure.LIGHTER), "--version"]).split()[-1]


def file_name(name):
    """How `lighter` turns the name of an output into the name of a file."""
    return "".join(c if c.isalnum() or c in ".-_" else "_" for c in name).lstrip(".") or "output"


def refused(done):
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": (lines or [f"exit code {done.returncode}"])[0][:400], "exit_code": done.returncode}


def read_outputs(folder, model):
    """Outputs in the graph's order."""
    outputs = []
    for name in measure.output_names(model):
        outputs.append(np.load(folder / f"{file_name(name)}.npy"))
    return outputs


def input_arguments(model):
    arguments = []
    for name, file in measure.bound_inputs(model):
        arguments += ["--input", f"{name}={file}"]
    return arguments


@functools.cache
def outputs(model, threads):
    """What `lighter run` answers; it is the same in every round."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(measure.LIGHTER), "run", str(measure.model_path(model)), *input_arguments(model), "--threads",
                   str(threads), "--output-dir", folder, "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        return read_outputs(pathlib.Path(folder), model) if done.returncode == 0 else []


def bench(model, threads, warmup, runs):
    """One process of `lighter bench`, in the form of a peer's report."""
    command = [str(measure.LIGHTER), "bench", str(measure.model_path(model)), *input_arguments(model), "--threads",
               str(threads), "--warmup", str(warmup), "--runs", str(runs), "--json", "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return {"error": "no answer in 600 s"}
    if done.returncode != 0:
        return refused(done)
    report = json.loads(done.stdout)
    measured = report["receipt"]["measured"]
    return {
        "version": version(), "run_seconds": report["seconds"], "load_seconds": measured["load_seconds"],
        "peak_resident_bytes": measured["peak_resident_bytes"], "fixed_resident_bytes": measured["fixed_bytes"],
        "predicted_seconds": report["receipt"]["predicted"]["seconds"], "outputs": outputs(model, threads),
    }


def doctor_fixed_bytes():
    """The fixed cost of the program as `lighter doctor` states it, or None."""
    done = subprocess.run([str(measure.LIGHTER), "doctor", "--dry-run", "--fast", "--json"], capture_output=True, text=True,
                          timeout=300)
    return json.loads(done.stdout)["fixed_cost_bytes"] if done.returncode == 0 else None


def run(model, threads, memory=None, cgroup=None):
    """One `lighter run` with a receipt, in `cgroup` if given.
    Returns exit code, receipt, raw outputs (bytes), wall seconds, and the peak resident bytes that this script saw itself."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        command = [str(measure.LIGHTER), "run", str(measure.model_path(model)), *input_arguments(model), "--threads",
                   str(threads), "--output-dir", str(folder), "--receipt", str(folder / "receipt.json")]
        if memory is not None:
            command += ["--memory", f"{memory}B"]
        if cgroup is not None:
            enter = 'for g in $LIGHTER_BENCH_CGROUP; do echo $$ > "$g/cgroup.procs"; done; exec "$@"'
            command = ["sh", "-c", enter, "sh", *command]
        environment = None if cgroup is None else {**os.environ, "LIGHTER_BENCH_CGROUP": str(cgroup)}
        start = time.perf_counter()
        with open(folder / "stderr", "w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
            seen = 0
            while process.poll() is None:
                try:
                    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                    if "Name:\tlighter" in status and "VmHWM:" in status:
                        seen = int(status.split("VmHWM:")[1].split()[0]) * 1024
                except (OSError, IndexError):
                    pass
                time.sleep(0.002)
            wall = time.perf_counter() - start
            errors.seek(0)
            message = errors.read()
        receipt = folder / "receipt.json"
        names = sorted(p for p in folder.glob("*.npy"))
        return {
            "exit_code": process.returncode, "wall_seconds": wall, "seen_peak_resident_bytes": seen,
            "receipt": json.loads(receipt.read_text()) if receipt.exists() else None,
            "output_bytes": {p.name: p.read_bytes() for p in names}, "message": message.strip()[-600:],
        }
