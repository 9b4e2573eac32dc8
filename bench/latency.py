#!/usr/bin/env python3
"""Latency at batch 1 of onnxruntime, rten, tract and lighter on the same models, inputs and threads.

    pip install numpy onnx==1.18.0 onnxruntime
    (cd bench/peers && cargo build --release) ; cargo build --release -p lightering
    bench/latency.py [--threads 1 2] [--rounds 7] [--engines …] [--models …]

Each round starts every engine once, in its own process, one after the other and in rotated order; a process loads the
model, warms up, and times some runs. The figure of a round is the median of its runs, the figure of an engine the median
over the rounds; the fastest single run stands beside it, because on a shared machine it is the steadier of the two.
Outputs are compared with onnxruntime's of the same round.
Writes bench/results/latency-<threads>t.json (with --neighbours N: latency-<threads>t-busy.json) and renders docs/performance.md from what is in bench/results.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import lighter
import measure
import tables

ENGINES = ("onnxruntime", "rten", "tract", "lighter")
TOLERANCE = 1e-4


def run(engine, model, threads, warmup, runs, folder):
    if engine == "lighter":
        return lighter.bench(model, threads, warmup, runs)
    return measure.run_peer(engine, model, threads, warmup, runs, folder)


def measure_model(model, engines, threads, options):
    rows = {engine: {"rounds": [], "best": [], "cpu": [], "peak": [], "load": []} for engine in engines}
    for number in range(options.rounds):
        shift = number % len(engines)
        outputs = {}
        for engine in engines[shift:] + engines[:shift]:
            row = rows[engine]
            if "error" in row:
                continue
            with tempfile.TemporaryDirectory() as folder:
                report = run(engine, model, threads, options.warmup, options.runs, pathlib.Path(folder))
            if "error" in report:
                row["error"] = report["error"]
                continue
            row["version"] = report["version"]
            row["rounds"].append(statistics.median(report["run_seconds"]))
            row["best"].append(min(report["run_seconds"]))
            row["cpu"].append(report.get("cpu_seconds_per_run"))
            row["peak"].append(report["peak_resident_bytes"])
            row["load"].append(report.get("load_seconds"))
            row["fixed"] = report.get("fixed_resident_bytes")
            outputs[engine] = report["outputs"]
        for engine, got in outputs.items():
            if engine != "onnxruntime" and "onnxruntime" in outputs and got:
                error = measure.relative_error(got, outputs["onnxruntime"])
                rows[engine]["relative_error"] = max(error, rows[engine].get("relative_error", 0.0))
    results = {}
    for engine, row in rows.items():
        if "error" in row or not row["rounds"]:
            results[engine] = {"error": row.get("error", "no run")}
            print(f"  {engine:12} error: {results[engine]['error']}", file=sys.stderr)
            continue
        known = lambda values: statistics.median(v for v in values if v is not None) if any(values) else None
        results[engine] = {
            "version": row["version"], "median_seconds": statistics.median(row["rounds"]), "best_seconds": min(row["best"]),
            "round_seconds": [round(s, 7) for s in row["rounds"]], "cpu_seconds_per_run": known(row["cpu"]),
            "load_seconds": known(row["load"]), "peak_resident_bytes": int(statistics.median(row["peak"])),
            "fixed_resident_bytes": row["fixed"], "relative_error": row.get("relative_error"),
        }
        print(f"  {engine:12} {results[engine]['median_seconds'] * 1e3:9.2f} ms (best {min(row['best']) * 1e3:.2f}), "
              f"peak {results[engine]['peak_resident_bytes'] / 1e6:.0f} MB, error {row.get('relative_error')}", file=sys.stderr)
    return results


def measure_threads(threads, engines, options):
    arguments = (f"--threads {threads} --rounds {options.rounds} --warmup {options.warmup} --runs {options.runs} "
                 f"--engines {' '.join(engines)}")
    if options.neighbours:
        arguments += f" --neighbours {options.neighbours}"
    result = measure.heading(f"bench/latency.py {arguments}") | {
        "threads": threads, "rounds": options.rounds, "runs_per_round": options.runs, "neighbours": options.neighbours,
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "tolerance": TOLERANCE, "models": {},
    }
    for model in measure.available(options.models):
        print(f"{model}, {threads} thread(s)", file=sys.stderr)
        result["models"][model] = measure_model(model, engines, threads, options)
    result["machine"]["load_average_at_end"] = os.getloadavg()[0]
    measure.write_result(f"latency-{threads}t{'-busy' if options.neighbours else ''}.json", result)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--models", nargs="+", default=list(measure.MODELS))
    parser.add_argument("--priority", type=int, help="nice value of the measured processes; below 0 needs root")
    parser.add_argument("--neighbours", type=int, default=0, help="busy foreign processes beside the measured one")
    parser.add_argument("--no-render", action="store_true", help="leave docs/ alone")
    options = parser.parse_args()
    engines = list(options.engines)
    if "lighter" in engines and not measure.LIGHTER.exists():
        print(f"lighter: skipped, no {measure.LIGHTER}; cargo build --release -p lightering", file=sys.stderr)
        engines.remove("lighter")
    if options.priority is not None:
        os.setpriority(os.PRIO_PROCESS, 0, options.priority)
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.neighbours)]
    try:
        for threads in options.threads:
            measure_threads(threads, engines, options)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    if not options.no_render:
        tables.render()


if __name__ == "__main__":
    main()
