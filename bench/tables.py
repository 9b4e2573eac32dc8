#!/usr/bin/env python3
"""Renders the tables of docs/performance.md and docs/conformance.md from the JSON in bench/results.

Only what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is replaced; the prose around it is written by hand.
"""

import json
import math
import re
import statistics

import measure

PEERS = ("onnxruntime", "rten", "tract")
DOCS = measure.REPOSITORY / "docs"


def load(name):
    path = measure.RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header, rows):
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in [header, align, *rows])


def provenance(result):
    machine = result["machine"]
    load = f"{machine['load_average_at_start']:.1f}"
    if "load_average_at_end" in machine:
        load += f" to {machine['load_average_at_end']:.1f}"
    smt = f" ({machine['threads_per_core']} threads to a core)" if machine.get("threads_per_core", 1) != 1 else ""
    return (f"{result['date']}, commit {result['commit']}, {machine['cpu']} (family/model {machine['cpu_family_model']}), "
            f"{machine['cores']} cores{smt}, {', '.join(machine['isa'])}; load average {load}.  \n"
            f"Command: `{result['command']}`.")


def versions(result):
    found = {}
    for row in result["models"].values():
        for engine, values in row.get("engines", row).items():
            if isinstance(values, dict) and "version" in values:
                found[engine] = values["version"]
    return ", ".join(f"{e} {v}" for e, v in sorted(found.items()))


def geometric_mean(values):
    return math.exp(statistics.fmean(math.log(v) for v in values))


def ratio(values, base, kind):
    """To onnxruntime. Of medians: the median over the rounds of each round's own ratio, so that a busy minute cancels out."""
    if kind == "best_seconds":
        return values[kind] / base[kind]
    return statistics.median(a / b for a, b in zip(values["round_seconds"], base["round_seconds"]))


def latency(name):
    result = load(f"latency-{name}")
    if result is None:
        return "Not measured yet.\n"
    engines = [e for e in ("lighter", *PEERS) if any(e in row for row in result["models"].values())]
    rows, ratios, wrong = [], {(e, k): [] for e in engines for k in ("median_seconds", "best_seconds")}, []
    for model, row in result["models"].items():
        base = row.get("onnxruntime", {})
        cells = [model]
        for engine in engines:
            values = row.get(engine, {"error": "not run"})
            if "error" in values:
                cells.append("–")
                wrong.append(f"{engine} on {model}: {values['error']}")
                continue
            cell = f"{values['median_seconds'] * 1e3:.2f}"
            if engine != "onnxruntime" and "median_seconds" in base:
                for kind in ("median_seconds", "best_seconds"):
                    ratios[engine, kind].append((ratio(values, base, kind), model))
                cell += f" ({ratio(values, base, 'median_seconds'):.2f}; {ratio(values, base, 'best_seconds'):.2f})"
                error = values.get("relative_error")
                if error is not None and error > result["tolerance"]:
                    cell += " ¹"
                    wrong.append(f"{engine} on {model}: differs from onnxruntime by {error:.1e} of the largest magnitude")
            cells.append(cell)
        rows.append(cells)
    mean = ["**geometric mean of the ratios**"]
    worst = ["**worst ratio**"]
    for engine in engines:
        pairs = ratios[engine, "median_seconds"]
        if engine == "onnxruntime" or not pairs:
            mean.append("1.00" if engine == "onnxruntime" else "–")
            worst.append("1.00" if engine == "onnxruntime" else "–")
            continue
        best = ratios[engine, "best_seconds"]
        mean.append(f"{geometric_mean([r for r, _ in pairs]):.2f}; {geometric_mean([r for r, _ in best]):.2f}")
        worst.append(f"{max(pairs)[0]:.2f} ({max(pairs)[1]}); {max(best)[0]:.2f} ({max(best)[1]})")
    text = [table(["model", *(f"{e}, ms" for e in engines)], [*rows, mean, worst]), ""]
    text.append(f"Median milliseconds; in brackets the ratio to onnxruntime (median over the rounds), then that of the fastest runs. {versions(result)}.")
    if "lighter" in engines and ratios["lighter", "median_seconds"]:
        for kind, name in (("median_seconds", "medians"), ("best_seconds", "fastest runs")):
            ours = [r for r, _ in ratios["lighter", kind]]
            ahead = {}
            for peer in ("rten", "tract"):
                pairs = [(row["lighter"][kind], row[peer][kind]) for row in result["models"].values()
                         if kind in row.get("lighter", {}) and kind in row.get(peer, {})]
                ahead[peer] = f"{sum(a < b for a, b in pairs)} of {len(pairs)}"
            text.append(f"By {name}: lighter is at most 1.25 × onnxruntime on {sum(r <= 1.25 for r in ours)} of {len(ours)} models, "
                        f"ahead of rten on {ahead['rten']} and of tract on {ahead['tract']}.")
    if wrong:
        text += ["", "¹ or a dash:", "", *(f"- {w}" for w in wrong)]
    return "\n".join([*text, "", provenance(result), ""])


def megabytes(value):
    return "–" if value is None else f"{value / 1e6:.1f}"


def memory():
    result = load("memory")
    if result is None:
        return "Not measured yet.\n"
    rows = []
    for model, row in result["models"].items():
        engines, cells = row["engines"], [model, megabytes(row["weight_bytes"]), megabytes(row.get("planned_activation_bytes"))]
        ours = engines.get("lighter", {}).get("peak_resident_bytes")
        bound = row.get("bound_bytes")
        cells.append(megabytes(ours))
        cells.append("–" if bound is None else f"{megabytes(bound)} ({'held' if row['within_bound'] else '**missed**'})")
        for engine in PEERS:
            values = engines.get(engine, {})
            peak = values.get("peak_resident_bytes")
            own = None if peak is None else peak - values["fixed_resident_bytes"]
            cells.append("–" if peak is None else f"{megabytes(peak)} ({megabytes(own)})")
        lower = row.get("arena_lower_bound_bytes")
        cells.append("–" if not lower else f"{row['planned_activation_bytes'] / lower:.3f}")
        rows.append(cells)
    header = ["model", "weights", "planned activations", "lighter", "bound", *PEERS, "activations / lower bound"]
    return "\n".join([
        table(header, rows), "",
        "Megabytes (10⁶), peak of the whole process (VmHWM) at load and run; bound = weights × 1.05 + 20 MB + planned activations. "
        "In brackets: beyond what the process held before it opened the model, which for onnxruntime takes Python and the "
        f"shared libraries out. {versions(result)}; {result['threads']} thread(s).", "", provenance(result), ""])


def budget(name):
    result = load(name)
    if result is None:
        return "Not measured yet.\n"
    fractions = sorted({r["fraction"] for r in result["runs"]}, reverse=True)
    rows, done, refused, broken = [], [], [], []
    for model, base in result["resident"].items():
        if "error" in base:
            rows.append([model, "–", *["–"] * len(fractions)])
            continue
        cells = [model, f"{megabytes(base['beyond_fixed_bytes'])} MB, {base['seconds'] * 1e3:.1f} ms"]
        for fraction in fractions:
            runs = [r for r in result["runs"] if r["model"] == model and r["fraction"] == fraction]
            good = [r for r in runs if r.get("same_bits") and r.get("within_budget")]
            done += good
            refused += [r for r in runs if r["exit_code"] == 3]
            broken += [r for r in runs if r["exit_code"] != 3 and r not in good]
            if good:
                slow = statistics.median(r["slowdown"] for r in good)
                peak = max(r["beyond_fixed_bytes"] / r["budget_bytes"] for r in good)
                cells.append(f"{slow:.2f} ×, peak {peak:.1%}" + ("" if len(good) == len(runs) else f" ({len(good)} of {len(runs)})"))
            elif runs and all(r["exit_code"] == 3 for r in runs):
                cells.append("refused")
            else:
                cells.append("**broken**")
        rows.append(cells)
    contained = sum("limit_bytes" in r["cgroup"] for r in result["runs"])
    text = [table(["model", "resident", *(f"{f:.0%}" for f in fractions)], rows), "",
            "Each cell: slow-down against a resident run right before it (median), and the highest measured peak beyond the fixed "
            "cost as a share of the budget.", "",
            f"Of {len(result['runs'])} runs, {len(done)} gave the resident run's bits within the budget, {len(refused)} were refused "
            f"before they started (exit code 3), {len(broken)} broke a promise; {contained} ran inside a memory control group of "
            "budget + fixed cost."]
    strict = [r["seen_peak_resident_bytes"] - result["doctor_fixed_bytes"] - r["budget_bytes"] for r in done
              if result["doctor_fixed_bytes"] and r["seen_peak_resident_bytes"]]
    if strict:
        text.append(f"Seen from outside, with the fixed cost that `lighter doctor` states ({megabytes(result['doctor_fixed_bytes'])} MB) "
                    f"instead of the one that each run measures of itself: {sum(s <= 0 for s in strict)} of {len(strict)} runs within the "
                    f"budget, the largest excess {max(0, max(strict)) / 1e6:.2f} MB.")
    errors = [abs(r["peak_error_percent"]) for r in done if r.get("peak_error_percent") is not None]
    if errors:
        text.append(f"Predicted against measured peak: median error {statistics.median(errors):.1f} %, worst {max(errors):.1f} %, "
                    f"within 3 % in {sum(e <= 3 for e in errors)} of {len(errors)} runs.")
    seconds = [abs(r["seconds_error_percent"]) for r in done if r.get("seconds_error_percent") is not None]
    if seconds:
        text.append(f"Predicted against measured time: median error {statistics.median(seconds):.0f} %, within 25 % in "
                    f"{sum(e <= 25 for e in seconds)} of {len(seconds)} runs.")
    for fraction, aim in ((0.5, 1.5), (0.25, 3.0)):
        slow = [r["slowdown"] for r in done if r["fraction"] == fraction]
        if slow:
            text.append(f"At {fraction:.0%}: slow-down at most {aim} × in {sum(s <= aim for s in slow)} of {len(slow)} runs "
                        f"(median {statistics.median(slow):.2f} ×, worst {max(slow):.2f} ×).")
    for run in broken:
        why = "outputs differ" if run.get("same_bits") is False else "over the budget" if run.get("within_budget") is False else (
            f"exit code {run['exit_code']}: {run.get('message', '')[:160]}")
        text.append(f"- broken: {run['model']} at {run['fraction']:.0%} ({megabytes(run['budget_bytes'])} MB): {why}")
    return "\n".join([*text, "", provenance(result), ""])


def conformance_summary():
    engines = [(e, load(f"conformance-{e}")) for e in ("lighter", *PEERS)]
    engines = [(e, r) for e, r in engines if r]
    if not engines:
        return "Not measured yet.\n"
    suites = list(engines[0][1]["suites"])
    rows = []
    for engine, result in engines:
        total = result["passed"] + result["failed"] + result["unsupported"]
        rows.append([f"{engine} {result['version'] or ''}".strip(), f"**{result['passed']}** of {total}", result["failed"],
                     result["unsupported"], *(f"{result['suites'][s]['passed']} of {sum(result['suites'][s].values())}" for s in suites)])
    text = [table(["engine", "passed", "failed", "unsupported", *suites], rows), ""]
    for _, result in engines:
        text += [provenance(result), ""]
    return "\n".join(text)


def conformance_operators():
    engines = [(e, load(f"conformance-{e}")) for e in ("lighter", *PEERS)]
    engines = [(e, r) for e, r in engines if r]
    if not engines:
        return "Not measured yet.\n"
    rows = []
    for op in sorted({op for _, r in engines for op in r["per_op"]}):
        counts = [r["per_op"].get(op) for _, r in engines]
        cases = max(sum(c.values()) for c in counts if c)
        cells = [op, cases]
        for (engine, _), c in zip(engines, counts):
            c = c or {"passed": 0, "failed": 0, "unsupported": 0}
            cells.append(f"{c['passed']} / {c['failed']} / {c['unsupported']}" if engine == "lighter" else
                         f"{c['passed']}" + (f" / {c['failed']}" if c["failed"] else ""))
        rows.append(cells)
    header = ["operator", "cases"] + [
        "lighter: passed / failed / unsupported" if e == "lighter" else f"{e}: passed (/ failed)" for e, _ in engines]
    return table(header, rows) + "\n"


def conformance_missed():
    """Cases that lighter does not pass."""
    result = load("conformance-lighter")
    if result is None:
        return "Not measured yet.\n"
    rows = [[name, *[c.replace("|", "\\|") for c in why.split(": ", 1)]] for name, why in result["not_passed"].items()]
    return table(["case", "state", "reason"], rows).replace("---:", "---") + "\n" if rows else "None.\n"


def superseded_cases():
    """Node cases whose stored output both a later reference implementation and onnxruntime contradict."""
    reference, runtime = load("superseded-cases"), load("conformance-onnxruntime")
    if not reference or not runtime:
        return []
    failed = {k.split("/")[1] for k, why in runtime["not_passed"].items() if k.startswith("node/") and why.startswith("failed")}
    return sorted(failed & set(reference["contradicted"]))


def superseded():
    cases = superseded_cases()
    if not cases:
        return "Not measured yet.\n"
    reference = load("superseded-cases")
    rows = []
    for engine in ("lighter", *PEERS):
        result = load(f"conformance-{engine}")
        if result:
            states = [result["not_passed"].get(f"node/{c}", "passed").split(":")[0] for c in cases]
            rows.append([engine, *(states.count(s) for s in ("passed", "failed", "unsupported"))])
    return "\n".join([
        f"{len(cases)} cases (reference implementation of onnx {reference['reference']}, onnxruntime {load('conformance-onnxruntime')['version']}):",
        "", ", ".join(f"`{c}`" for c in cases) + ".", "", table(["engine", "passed", "failed", "unsupported"], rows), ""])


def lm_speed():
    result = load("lm-speed")
    if not result:
        return "Not measured yet.\n"
    rows = []
    for r in result["rows"]:
        rows.append([r["model"], r["threads"],
                     f"{r['prompt']['lighter']:.0f}", f"{r['prompt']['llama.cpp']:.0f}", f"{r['prompt']['ratio']:.2f}",
                     f"{r['answer']['lighter']:.1f}", f"{r['answer']['llama.cpp']:.1f}", f"{r['answer']['ratio']:.2f}",
                     f"{r['bytes_per_second'] / 1e9:.1f}"])
    header = ["model", "threads", "prompt, tokens/s", "llama.cpp", "ratio", "answer, tokens/s", "llama.cpp", "ratio",
              "weights, GB/s"]
    return "\n".join([
        f"Prompt of {result['prompt']} tokens, answer of {result['tokens']} behind it, {result['rounds']} rounds in turns; "
        f"the ratio is the median over the rounds, above 1 lighter is faster. llama.cpp {result['llama.cpp']}.", "",
        table(header, rows), "", provenance(result), ""])


def lm_budgets():
    texts = []
    for path in sorted(measure.RESULTS.glob("lm-budget-*.json")):
        result = json.loads(path.read_text())
        rows = []
        for s in result["shares"]:
            if "answer" not in s:
                rows.append([f"{s['share']:.0%}", "refused"] + [""] * 8)
                continue
            experts = next((r["experts"] for r in s["runs"] if r.get("experts")), None)
            rows.append([
                f"{s['share']:.0%}", megabytes(s["memory"]), f"{s['answer']:.2f}", f"{s['of_resident']:.0%}",
                f"{s['llama_answer']:.2f}" if "llama_answer" in s else "failed", f"{s['ratio']:.1f}" if "ratio" in s else "",
                f"{s['bytes_per_token'] / 1e6:.0f}", f"{s['disk_rate'] / 1e6:.0f}", f"{s['disk_share']:.0%}",
                f"{experts['hit_rate']:.0%}" if experts else "", f"{s['peak'] / s['limit']:.1%}"])
        header = ["memory by file size", "MB", "tokens/s", "of resident", "llama.cpp, mmap", "ratio", "MB read for a token",
                  "disk, MB/s", "time that reading alone would take", "experts found", "cgroup peak of limit"]
        texts += [f"**{result['model']}**, {result['file_bytes'] / 1e9:.2f} GB, {result['threads']} threads; resident "
                  f"{result['resident']['answer']:.2f} tokens/s.", "", table(header, rows), "", provenance(result), ""]
    return "\n".join(texts) or "Not measured yet.\n"


def lm_greedy():
    texts = []
    for path in sorted(measure.RESULTS.glob("lm-greedy-*.json")):
        result = json.loads(path.read_text())
        differing = [r for r in result["prompts"] if not r["equal"]]
        rows = [[f"`{json.dumps(r['prompt'], ensure_ascii=False)[1:-1]}`", r["first_difference"],
                 f"{r['gap']:.3f}" if "gap" in r else "–"] for r in differing]
        texts += [f"**{result['model']}**: {result['equal']:.0%} of {len(result['prompts'])} prompts give the same text of up to "
                  f"{result['tokens']} tokens" + (", the others differ first here:" if rows else "."), ""]
        if rows:
            texts += [table(["prompt", "first differing token", "gap"], rows), ""]
        texts += [provenance(result), ""]
    return "\n".join(texts) or "Not measured yet.\n"


def lm_policies():
    texts = []
    for path in sorted(measure.RESULTS.glob("lm-policies-*.json")):
        result = json.loads(path.read_text())
        rows = []
        for r in result["runs"]:
            if "error" in r:
                rows.append([r["eviction"], r["prefetch"], r["admission"], "failed"] + [""] * 6)
                continue
            rows.append([r["eviction"], r["prefetch"], r["admission"], f"{r['tokens_per_second']:.2f}",
                         f"{r['gain']:+.1%}" if r.get("gain") is not None else "", f"{r['live_hit_rate']:.1%}",
                         f"{r['replayed_hit_rate']:.1%}" if r.get("replayed_hit_rate") is not None else "",
                         f"{100 * r['difference']:+.2f}" if r.get("difference") is not None else "",
                         f"{r['bytes_per_token'] / 1e6:.2f}"])
        header = ["eviction", "prefetch", "admission", "tokens/s", "over none", "hits, live", "replayed", "difference, points",
                  "MB read for a token"]
        texts += [f"**{result['model']}**, {megabytes(result['file_bytes'])} MB in a budget of {megabytes(result['memory'])} MB, "
                  f"{result['tokens']} tokens; {result['note']}", "", table(header, rows), "", provenance(result), ""]
    return "\n".join(texts) or "Not measured yet.\n"


BLOCKS = {
    "language-models.md": {"lm-speed": lm_speed, "lm-budgets": lm_budgets},
    "performance.md": {"latency-1t": lambda: latency("1t"), "latency-2t": lambda: latency("2t"),
                       "latency-2t-busy": lambda: latency("2t-busy"), "memory": memory, "budget": lambda: budget("budget"), "budget-warm": lambda: budget("budget-warm"),
                       "lm-greedy": lm_greedy, "lm-policies": lm_policies},
    "conformance.md": {"summary": conformance_summary, "superseded": superseded,
                       "operators": conformance_operators, "missed": conformance_missed},
}


def render():
    for file, blocks in BLOCKS.items():
        path = DOCS / file
        text = path.read_text()
        for name, render in blocks.items():
            begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            if begin not in text:
                continue
            pattern = re.escape(begin) + ".*?" + re.escape(end)
            block = f"{begin}\n\n{render()}\n{end}"
            text = re.sub(pattern, lambda _: block, text, flags=re.S)
        path.write_text(text)


if __name__ == "__main__":
    render()
