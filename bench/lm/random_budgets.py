#!/usr/bin/env python3
"""Do budgets of language models hold? Random models and budgets, each run in a memory cgroup of that size.

    bench/lm/random_budgets.py [--runs 100] [--seed 1] [MODEL.gguf …]

Each run is `lighter generate --temperature 0 --memory B` in a cgroup of B and the program's fixed cost. It holds when the
tokens are those of the run without a budget and the group's own peak is within its limit, or when it is refused with exit
code 3 before anything is loaded. Writes bench/results/lm-random-budgets.json.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from cgroup import Cgroup, entering
import lighter
import measure

TINY = measure.REPOSITORY / "crates" / "lm" / "tests" / "data" / "moe-tiny-q4_0.gguf"
PROMPTS = ("Once upon a time", "First Citizen:\n", "The answer is", "fn main() {")


def generate(path, prompt, context, threads, memory=None, limit=None):
    command = [measure.LIGHTER, "generate", path, prompt, "-n", 12, "--temperature", 0, "--context", context,
               "--threads", threads, "--step-tokens", 16, "--json", "-q"]
    command = [str(c) for c in command + (["--memory", f"{memory}B"] if memory else [])]
    peak = None
    if limit:
        group = Cgroup(limit)
        done = subprocess.run(entering(command, group), capture_output=True, text=True)
        peak = group.peak()
        group.remove()
    else:
        done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout) if done.stdout.strip().startswith("{") else None
    return done.returncode, report, peak, done.stderr[-300:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("models", nargs="*", type=pathlib.Path)
    options = parser.parse_args()
    models = options.models or [TINY, *(measure.DATA / "models" / f"{m}.gguf" for m in
                                        ("gemma3-270m-q4_k_m", "qwen2.5-coder-0.5b-q4_k_m"))]
    words = [pathlib.Path(a).name if "/" in a else a for a in sys.argv[1:]]
    result = measure.heading(" ".join(["bench/lm/random_budgets.py", *words]))
    fixed, chance = lighter.doctor_fixed_bytes() or 0, random.Random(options.seed)
    counts, rows, resident = collections.Counter(), [], {}
    for _ in range(options.runs):
        path, prompt = chance.choice(models), chance.choice(PROMPTS)
        context, threads = chance.choice((64, 256, 1024)), chance.choice((1, 2))
        key = (path, prompt, context)
        if key not in resident:
            _, report, _, _ = generate(path, prompt, context, threads)
            resident[key] = [t["id"] for t in report["tokens"]], report["receipt"]["measured"]["peak_beyond_fixed_bytes"]
        tokens, whole = resident[key]
        memory = int(whole * chance.uniform(0.1, 1.1))
        os.posix_fadvise(os.open(path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        code, report, peak, message = generate(path, prompt, context, threads, memory, memory + fixed)
        if code == 3:
            outcome = "refused"
        elif code != 0 or report is None:
            outcome = "failed"
        elif [t["id"] for t in report["tokens"]] != tokens:
            outcome = "other tokens"
        elif peak is not None and peak > memory + fixed + 4096:
            outcome = "over the limit"
        else:
            outcome = "held"
        counts[outcome] += 1
        rows.append({"model": path.stem, "share": memory / whole, "memory": memory, "threads": threads, "context": context,
                     "outcome": outcome, "peak": peak, "limit": memory + fixed,
                     "message": message if outcome not in ("held", "refused") else ""})
        if outcome not in ("held", "refused"):
            print(rows[-1], file=sys.stderr)
    result |= {"seed": options.seed, "counts": dict(counts), "runs": rows}
    print(dict(counts), file=sys.stderr)
    measure.write_result("lm-random-budgets.json", result)


if __name__ == "__main__":
    main()
