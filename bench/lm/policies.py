#!/usr/bin/env python3
"""Each combination of policies on a mixture of experts inside a budget, live and replayed from what it recorded.

    bench/lm/policies.py MODEL.gguf --memory 24MiB [--tokens 64] [--text FILE]

First a run without reading ahead records which experts the routers choose; the policies that learn from a run or know
the future get that record. Then every combination of eviction, prefetch and admission generates the same text with a
record of its own, which `lighter tier replay` runs with the same policies on as many chunks as the live store had and a
disk of the rate at which that run read.
The hit rates of both are printed side by side, beside tokens a second and the gain over the same eviction without
reading ahead. Pages of the file are dropped before each run, and reads go past the page cache.
Writes bench/results/lm-policies-NAME.json and renders docs/performance.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import measure
import tables

EVICTIONS = ("lru", "lru-global", "lfu", "static-hot", "belady")
PREFETCHES = (("none", "never"), ("repeat-last", "always"), ("repeat-last", "pays"), ("frequency", "always"),
              ("frequency", "pays"), ("oracle", "always"), ("oracle", "pays"))


def run(command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True)


def live(options, eviction, prefetch, admission, trace, recorded):
    with open(options.model, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [measure.LIGHTER, "bench", options.model, "--memory", options.memory, "--threads", options.threads,
               "--prompt-tokens", options.prompt, "--tokens", options.tokens, "--runs", 1, "--warmup", 0, "--step-tokens",
               options.prompt, "--json", "-q", "--experts", eviction, "--prefetch", prefetch, "--admission", admission,
               "--chunk-trace", trace]
    if options.text:
        command += ["--text", options.text]
    if recorded:
        command += ["--recorded", recorded]
    done = run(command)
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    report = json.loads(done.stdout)
    experts = report.get("experts")
    if not experts:
        return {"error": "all experts fit into this budget; a smaller --memory"}
    return {"tokens_per_second": report["tokens_per_second"], "live_hit_rate": experts["hit_rate"],
            "bytes_per_token": report["bytes_read_per_token"], "stall_share": report["stall_share"],
            "slots": experts["slots"], "chunks": experts["chunks"],
            # While at least one read was under way.
            "disk_rate": (experts["demand_bytes"] + experts["prefetch_bytes"]) / max(experts["reading"], 1e-9)}


def replayed(trace, eviction, prefetch, admission, slots, rate):
    done = run([measure.LIGHTER, "tier", "replay", trace, "--policy", eviction, "--prefetch", prefetch, "--admission",
                admission, "--capacity", slots, "--disk-rate", f"{rate / 1e6:.0f}MB/s", "--json", "-q"])
    if done.returncode:
        return {"replay_error": done.stderr.strip()[-300:]}
    rows = [r for r in json.loads(done.stdout)["rows"] if r["eviction"] == eviction and r["prefetch"] == prefetch]
    return {"replayed_hit_rate": rows[0]["hit_rate"]} if rows else {"replay_error": "no such row"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--memory", required=True, help="such as 24MiB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    words = [pathlib.Path(a).name if "/" in a else a for a in sys.argv[1:]]
    result = measure.heading(" ".join(["bench/lm/policies.py", *words]))
    result |= {"model": options.model.stem, "file_bytes": options.model.stat().st_size, "memory": int(options.memory.removesuffix("MiB")) << 20,
               "tokens": options.tokens, "note": options.note, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        recorded = pathlib.Path(folder) / "recorded.trace"
        first = live(options, "lru", "none", "never", recorded, None)
        if "error" in first:
            raise SystemExit(first["error"])
        for eviction in EVICTIONS:
            base = None
            for prefetch, admission in PREFETCHES:
                row = {"eviction": eviction, "prefetch": prefetch, "admission": admission}
                # Of several runs the one in the middle, with its own record.
                runs = []
                for round in range(options.rounds):
                    own = pathlib.Path(folder) / f"{round}.trace"
                    runs.append((live(options, eviction, prefetch, admission, own, recorded), own))
                runs.sort(key=lambda run: run[0].get("tokens_per_second", 0))
                values, trace = runs[len(runs) // 2]
                row |= values
                if "error" not in row:
                    row |= replayed(trace, eviction, prefetch, admission, row["slots"], row["disk_rate"])
                    if prefetch == "none":
                        base = row["tokens_per_second"]
                    row["gain"] = row["tokens_per_second"] / base - 1 if base and prefetch != "none" else None
                    if "replayed_hit_rate" in row:
                        row["difference"] = row["replayed_hit_rate"] - row["live_hit_rate"]
                result["runs"].append(row)
                print(row, file=sys.stderr)
    measure.write_result(f"lm-policies-{options.model.stem}.json", result)
    tables.render()


if __name__ == "__main__":
    main()
