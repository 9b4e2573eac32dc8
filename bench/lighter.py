"""`lighter` under measurement: its fixed command line (`lighter run`, `lighter bench`, `lighter doctor`) and its receipt."""

import json
import pathlib
import subprocess
import tempfile
import time

import measure
import numpy as np

NPY_NAME = str.maketrans({c: "_" for c in '/\\:*?"<>|'})


def refused(done):
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": (lines or [f"exit code {done.returncode}"])[0][:400], "exit_code": done.returncode}


def read_outputs(folder, model):
    """Outputs in the graph's order; a name that is no file name has its separators replaced."""
    outputs = []
    for name in measure.output_names(model):
        candidates = [folder / f"{name}.npy", folder / f"{name.translate(NPY_NAME)}.npy"]
        file = next((c for c in candidates if c.exists()), None)
        if file is None:
            return []
        outputs.append(np.load(file))
    return outputs


def input_arguments(model):
    arguments = []
    for name, file in measure.bound_inputs(model):
        arguments += ["--input", f"{name}={file}"]
    return arguments


def bench(model, threads, warmup, runs, folder):
    """One process of `lighter bench`, in the form of a peer's report; outputs come from one `lighter run`."""
    command = [str(measure.LIGHTER), "bench", str(measure.model_path(model)), *input_arguments(model), "--threads",
               str(threads), "--warmup", str(warmup), "--runs", str(runs), "--output-dir", str(folder), "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return {"error": "no answer in 600 s"}
    if done.returncode != 0:
        return refused(done)
    report = json.loads(done.stdout)
    return {
        "version": report.get("version", "unknown"), "run_seconds": report["run_seconds"],
        "load_seconds": report.get("load_seconds"), "cpu_seconds_per_run": report.get("cpu_seconds_per_run"),
        "peak_resident_bytes": report["peak_resident_bytes"], "fixed_resident_bytes": report.get("fixed_resident_bytes"),
        "outputs": read_outputs(pathlib.Path(folder), model),
    }


def doctor_fixed_bytes():
    """The fixed cost of the program as `lighter doctor` states it, or None."""
    done = subprocess.run([str(measure.LIGHTER), "doctor", "--json"], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        return None
    report = json.loads(done.stdout)
    return report.get("fixed_bytes") or report.get("fixed_resident_bytes")


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
        environment = None if cgroup is None else {**measure.os.environ, "LIGHTER_BENCH_CGROUP": str(cgroup)}
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
