#!/usr/bin/env python3
"""Tokens per second of language models that fit, beside llama.cpp: same file, same threads, interleaved, medians.

    cargo build --release -p lightering
    LLAMA_BIN=DIR bench/lm/speed.py [--models …] [--threads 1 2] [--rounds 5] [--prompt 256] [--tokens 64]

LLAMA_BIN holds llama-bench, built with the CPU's own instruction set (cmake -DGGML_NATIVE=ON) from the sources in the
PyPI package llama-cpp-python==0.3.36. Each round runs both engines once, in turns. The answer of both begins behind the
prompt. Writes bench/results/lm-speed.json and renders docs/language-models.md from what is in bench/results.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import measure
import tables

LLAMA = pathlib.Path(os.environ.get("LLAMA_BIN", "."))
MODELS = ("gemma3-270m-q4_k_m", "qwen2.5-coder-0.5b-q4_k_m")


def json_of(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def run_lighter(path, threads, options):
    report = json_of([measure.LIGHTER, "bench", path, "--threads", threads, "--prompt-tokens", options.prompt,
                      "--tokens", options.tokens, "--runs", 1, "--warmup", 1, "--step-tokens", options.step,
                      "--json", "-q"])
    return {"prompt": report["prompt_tokens_per_second"], "answer": report["tokens_per_second"],
            "weight_bytes": report["weight_bytes_per_token"],
            "peak_bytes": report["receipt"]["measured"]["peak_resident_bytes"]}


def run_llama(path, threads, options):
    common = [LLAMA / "llama-bench", "-m", path, "-t", threads, "-r", 1, "-o", "json"]
    prompt = json_of([*common, "-p", options.prompt, "-n", 0])[0]
    answer = json_of([*common, "-p", 0, "-n", options.tokens, "-d", options.prompt])[0]
    return {"prompt": prompt["avg_ts"], "answer": answer["avg_ts"], "version": prompt["build_commit"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step", type=int, default=256)
    options = parser.parse_args()
    result = measure.heading(" ".join(["bench/lm/speed.py", *sys.argv[1:]]))
    result |= {"prompt": options.prompt, "tokens": options.tokens, "rounds": options.rounds, "rows": []}
    for model in options.models:
        path = measure.DATA / "models" / f"{model}.gguf"
        for threads in options.threads:
            runs = {"lighter": [], "llama.cpp": []}
            for number in range(options.rounds):
                engines = [("lighter", run_lighter), ("llama.cpp", run_llama)]
                for name, run in engines if number % 2 == 0 else engines[::-1]:
                    runs[name].append(run(path, threads, options))
            median = lambda name, what: statistics.median(r[what] for r in runs[name])
            row = {"model": model, "threads": threads}
            for what in ("prompt", "answer"):
                row[what] = {name: median(name, what) for name in runs}
                # Paired by round, so that what disturbs the machine for a while disturbs both.
                ratios = [a[what] / b[what] for a, b in zip(runs["lighter"], runs["llama.cpp"])]
                row[what] |= {"ratio": statistics.median(ratios), "ratios": ratios}
            row["weight_bytes_per_token"] = runs["lighter"][0]["weight_bytes"]
            row["bytes_per_second"] = row["answer"]["lighter"] * row["weight_bytes_per_token"]
            row["peak_bytes"] = median("lighter", "peak_bytes")
            result["rows"].append(row)
            result["llama.cpp"] = runs["llama.cpp"][0]["version"]
            print(f"{model} {threads}t: prompt {row['prompt']['lighter']:.0f} / {row['prompt']['llama.cpp']:.0f} = "
                  f"{row['prompt']['ratio']:.2f}, answer {row['answer']['lighter']:.1f} / "
                  f"{row['answer']['llama.cpp']:.1f} = {row['answer']['ratio']:.2f}", file=sys.stderr)
    measure.write_result("lm-speed.json", result)
    tables.render()


if __name__ == "__main__":
    main()
