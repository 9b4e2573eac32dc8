#!/usr/bin/env python3
"""Does a memory budget hold, and what does it cost? Models x budgets in random order, each under a memory cgroup.

    cargo build --release -p lightering
    bench/budget.py [--repeat 3] [--fractions 1.0 0.75 0.5 0.25] [--threads 2] [--seed N]

For each model: three resident runs; then, per repetition, each fraction of the resident run's memory beyond the fixed cost
(jittered by up to 3 %, shuffled with the other models), with `lighter run --memory B --receipt`, inside a memory cgroup
whose limit is B plus the fixed cost that `lighter doctor` states. Right before each comes a resident run, which its
slow-down is against. The model's pages are dropped from the page cache before every run, so that streamed weights come
from the disk, as they would where the model does not fit (--warm leaves them).
A run holds when it ends well under the cgroup, its outputs are bit for bit the resident run's, and the receipt's measured
peak beyond the fixed cost is at most B. A refusal (exit code 3) is counted apart.
Needs the right to make a memory cgroup (v1 or v2); without it, it runs without and says so in the result.
Writes bench/results/budget.json (budget-warm.json) and renders docs/performance.md.
"""

import argparse
import os
import pathlib
import random
import statistics
import sys

from cgroup import Cgroup
import lighter
import measure
import tables


def drop_pages(model):
    """Drops the model file from the page cache."""
    with open(measure.model_path(model), "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def contained_run(model, threads, memory, limit):
    try:
        cgroup = Cgroup(limit)
    except OSError as error:
        return lighter.run(model, threads, memory), {"error": str(error)}
    try:
        done = lighter.run(model, threads, memory, cgroup.path)
        return done, {"version": cgroup.version, "limit_bytes": limit, "peak_bytes": cgroup.peak()}
    finally:
        cgroup.remove()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warm", action="store_true", help="leave the model file in the page cache")
    parser.add_argument("--models", nargs="+", default=list(measure.MODELS))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    result = measure.heading(f"bench/budget.py --repeat {options.repeat} --threads {options.threads} --seed {options.seed}{' --warm' if options.warm else ''}")
    fixed = lighter.doctor_fixed_bytes()
    result |= {"threads": options.threads, "seed": options.seed, "doctor_fixed_bytes": fixed, "page_cache_dropped": not options.warm, "resident": {}, "runs": []}
    resident = {}
    for model in measure.available(options.models):
        runs = [lighter.run(model, options.threads) for _ in range(3)]
        done = runs[-1]
        if done["exit_code"] != 0 or done["receipt"] is None:
            result["resident"][model] = {"error": done["message"], "exit_code": done["exit_code"]}
            print(f"{model}: resident run ended with {done['exit_code']}: {done['message']}", file=sys.stderr)
            continue
        measured = [r["receipt"]["measured"] for r in runs]
        resident[model] = done["output_bytes"]
        result["resident"][model] = {
            "beyond_fixed_bytes": max(m["peak_beyond_fixed_bytes"] for m in measured),
            "peak_resident_bytes": max(m["peak_resident_bytes"] for m in measured),
            "fixed_bytes": done["receipt"]["predicted"]["fixed_bytes"],
            "seconds": statistics.median(m["seconds"] for m in measured),
            "wall_seconds": statistics.median(r["wall_seconds"] for r in runs),
            "predicted_peak_bytes": done["receipt"]["predicted"]["peak_bytes"],
            "peak_error_percent": done["receipt"]["error"]["peak_percent"],
            "same_bits": all(r["output_bytes"] == done["output_bytes"] for r in runs),
        }
    cases = [(m, f) for m in resident for f in options.fractions] * options.repeat
    chance.shuffle(cases)
    for model, fraction in cases:
        base = result["resident"][model]
        # A budget of the whole resident peak is not jittered below it.
        jitter = chance.uniform(1.0, 1.03) if fraction >= 1.0 else chance.uniform(0.97, 1.03)
        budget = int(base["beyond_fixed_bytes"] * fraction * jitter)
        beside = lighter.run(model, options.threads)
        if not options.warm:
            drop_pages(model)
        done, cgroup = contained_run(model, options.threads, budget, budget + (fixed or base["fixed_bytes"]))
        receipt = done["receipt"]
        run = {"model": model, "fraction": fraction, "budget_bytes": budget, "exit_code": done["exit_code"],
               "cgroup": cgroup, "seen_peak_resident_bytes": done["seen_peak_resident_bytes"],
               "wall_slowdown": done["wall_seconds"] / beside["wall_seconds"]}
        if receipt is not None and done["exit_code"] == 0:
            measured = receipt["measured"]
            run |= {
                "same_bits": done["output_bytes"] == resident[model] and bool(resident[model]),
                "beyond_fixed_bytes": measured["peak_beyond_fixed_bytes"],
                "within_budget": measured["peak_beyond_fixed_bytes"] <= budget,
                "peak_resident_bytes": measured["peak_resident_bytes"],
                "peak_error_percent": receipt["error"]["peak_percent"],
                "seconds_error_percent": receipt["error"]["seconds_percent"],
                "slowdown": measured["seconds"] / beside["receipt"]["measured"]["seconds"], "strategy": receipt["plan"]["strategy"],
                "bytes_read_by_tier": receipt["bytes_read_by_tier"],
            }
        else:
            run["message"] = done["message"]
        result["runs"].append(run)
        verdict = "refused" if run["exit_code"] == 3 else f"exit {run['exit_code']}" if "same_bits" not in run else (
            f"bits {'same' if run['same_bits'] else 'DIFFER'}, peak {run['beyond_fixed_bytes'] / budget:.3f} of the budget, "
            f"slow-down {run['slowdown']:.2f}")
        print(f"{model} {fraction:.0%} ({budget / 1e6:.1f} MB): {verdict}", file=sys.stderr)
    measure.write_result("budget-warm.json" if options.warm else "budget.json", result)
    tables.render()


if __name__ == "__main__":
    main()
