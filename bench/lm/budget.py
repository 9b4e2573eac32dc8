#!/usr/bin/env python3
"""A language model larger than its memory, beside llama.cpp with its file mapped, each in a memory cgroup of that size.

    LLAMA_BIN=DIR bench/lm/budget.py MODEL.gguf [--shares 0.5 0.25] [--rounds 3] [--text FILE] [-- lighter's flags]

First the model runs without a limit. Then, for each share of the file's size, lighter runs with that as --memory in a
cgroup of that size and its fixed cost, and llama-completion (mmap) in a cgroup of the same size; pages of the file are dropped
before. The disk's rate is measured on the file itself just before, by four threads with O_DIRECT.
Writes bench/results/lm-budget-NAME.json and renders docs/language-models.md.
"""

import argparse
import concurrent.futures
import json
import mmap
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from cgroup import Cgroup, entering
import lighter
import measure
import tables

LLAMA = pathlib.Path(os.environ.get("LLAMA_BIN", "."))


def drop_pages(path):
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(path, total=512 << 20, threads=4):
    """Bytes a second past the page cache: the best of reads of 1 and 4 MiB, in order and at random."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    rates = []
    for block in (1 << 20, 4 << 20):
        size = os.fstat(file).st_size // block
        for shuffled in (False, True):
            places = [(i % size) * block for i in range(min(total // block, 2 * size))]
            if shuffled:
                random.shuffle(places)

            def read(part):
                buffer = mmap.mmap(-1, block)
                for place in part:
                    os.preadv(file, [buffer], place)

            start = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, [places[i::threads] for i in range(threads)]))
            rates.append(len(places) * block / (time.perf_counter() - start))
    os.close(file)
    return max(rates)


def contained(command, limit):
    group = Cgroup(limit)
    try:
        done = subprocess.run(entering([str(c) for c in command], group), capture_output=True, text=True)
        return done, group.peak()
    finally:
        group.remove()


def run_lighter(options, memory, limit):
    command = [measure.LIGHTER, "bench", options.model, "--threads", options.threads, "--prompt-tokens", options.prompt,
               "--tokens", options.tokens, "--runs", 1, "--warmup", 1, "--step-tokens", options.step, "--json", "-q",
               *options.flags]
    if options.text:
        command += ["--text", options.text]
    if memory is None:
        done, peak = subprocess.run([str(c) for c in command], capture_output=True, text=True), None
    else:
        done, peak = contained([*command, "--memory", f"{memory}B"], limit)
    if done.returncode:
        return {"error": done.stderr[-400:], "exit": done.returncode}
    report = json.loads(done.stdout)
    measured = report["receipt"]["measured"]
    return {"prompt": report["prompt_tokens_per_second"], "answer": report["tokens_per_second"],
            "bytes_per_token": report["bytes_read_per_token"], "stall_share": report["stall_share"],
            "experts": report.get("experts"), "peak_beyond_fixed": measured["peak_beyond_fixed_bytes"],
            "cgroup_peak": peak, "limit": limit}


def run_llama(options, limit):
    # Without repacking, which would need the weights a second time as memory of its own.
    command = [LLAMA / "llama-completion", "-m", options.model, "-t", options.threads, "-p", "The", "-n",
               options.llama_tokens + 1, "-c", 256, "--load-mode", "mmap", "--no-repack", "--no-warmup", "-no-cnv",
               "--temp", 0, "--ignore-eos"]
    done, peak = contained(command, limit)
    rates = re.findall(r"(?<!prompt) eval time =.*?([\d.]+) tokens per second", done.stdout + done.stderr)
    if done.returncode or not rates:
        return {"error": (done.stderr or "killed")[-400:], "exit": done.returncode}
    return {"answer": float(rates[-1]), "cgroup_peak": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--name")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--step", type=int, default=32)
    parser.add_argument("--llama-tokens", type=int, default=4)
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    name = options.name or options.model.stem
    size, fixed = options.model.stat().st_size, lighter.doctor_fixed_bytes() or 0
    words = [pathlib.Path(a).name if "/" in a else a for a in sys.argv[1:]]
    result = measure.heading(" ".join(["bench/lm/budget.py", *words]))
    result |= {"model": name, "file_bytes": size, "threads": options.threads, "shares": []}
    resident = [run_lighter(options, None, None) for _ in range(options.rounds)]
    result["resident"] = {"answer": statistics.median(r["answer"] for r in resident),
                          "prompt": statistics.median(r["prompt"] for r in resident)}
    print("resident", result["resident"], file=sys.stderr)
    for share in options.shares:
        memory = int(size * share)
        limit = memory + fixed
        rows, llama, rates = [], [], []
        for _ in range(options.rounds):
            rates.append(disk_rate(options.model))
            drop_pages(options.model)
            rows.append(run_lighter(options, memory, limit))
            drop_pages(options.model)
            llama.append(run_llama(options, limit))
        entry = {"share": share, "memory": memory, "limit": limit, "disk_rate": statistics.median(rates),
                 "runs": rows, "llama.cpp": llama}
        good, other = [r for r in rows if "answer" in r], [r for r in llama if "answer" in r]
        if good:
            entry |= {"answer": statistics.median(r["answer"] for r in good),
                      "bytes_per_token": statistics.median(r["bytes_per_token"] for r in good),
                      "peak": max(r["cgroup_peak"] or 0 for r in good)}
            entry["of_resident"] = entry["answer"] / result["resident"]["answer"]
            # The time that reading alone would take, as a part of the time that a token took.
            entry["disk_share"] = entry["bytes_per_token"] / entry["disk_rate"] * entry["answer"]
        if good and other:
            entry["llama_answer"] = statistics.median(r["answer"] for r in other)
            entry["ratio"] = entry["answer"] / entry["llama_answer"]
        result["shares"].append(entry)
        print({k: v for k, v in entry.items() if k not in ("runs", "llama.cpp")},
              [r.get("error") for r in rows + llama if "error" in r], file=sys.stderr)
    measure.write_result(f"lm-budget-{name}.json", result)
    tables.render()


if __name__ == "__main__":
    main()
