#!/usr/bin/env python3
"""How many of ONNX's own backend cases each engine passes, per operator.

    tools/fetch_test_data.sh
    cargo build --release -p lightering ; (cd bench/peers && cargo build --release)
    bench/conformance.py [--engines lighter rten tract]

Suites: node, simple, pytorch-operator, pytorch-converted of the onnx 1.18.0 wheel; rtol 1e-3, atol 1e-7, as in ONNX's runner.
A case is *unsupported* when the engine itself refuses it with an error, *failed* when it gives another answer, panics,
crashes or takes longer than 30 seconds. rten narrows 64-bit integers and booleans to i32 and doubles to f32 by design, so
its outputs are compared by value and not by element type. tract gets a second attempt with integer inputs as constants.
A case belongs to the operator that its graph is made of; the expansion of a function belongs to the function.
Writes bench/results/conformance-<engine>.json and renders docs/conformance.md.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import lighter
import measure
import onnx
import tables

CASES = measure.DATA / "onnx-1.18.0" / "onnx" / "backend" / "test" / "data"
SUITES = ("node", "simple", "pytorch-operator", "pytorch-converted")


def operators(folder):
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {n.op_type for n in graph.node}


def operator(folder):
    """The operator that a case is about."""
    plain = folder.name.split("_expanded")[0]
    sibling = folder.with_name(plain)
    found = operators(sibling if plain != folder.name and sibling.exists() else folder)
    found = found - {"Constant"} or {"Constant"}
    return found.pop() if len(found) == 1 else "(several)"


def run_engine(engine, root):
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "report.json"
        if engine == "lighter":
            command = [str(measure.LIGHTER), "conformance", "--onnx", str(root), "--json", "--quiet"]
            # Exit code 1 says that some case missed, which is what is being counted.
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode not in (0, 1):
                raise SystemExit(f"lighter conformance: {done.stderr[-500:]}")
            report = json.loads(done.stdout)
            for case in report["cases"]:
                case["suite"], _, case["name"] = case["name"].partition("/")
                case["detail"] = case["reason"]
            return report | {"version": lighter.version()}
        command = [*measure.PROGRAMS[engine], "conformance", "--onnx", str(root), "--timeout", "30", "--json", str(file)]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())


def count(rows):
    total = {"passed": 0, "failed": 0, "unsupported": 0}
    for status in rows:
        total[status] += 1
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["lighter", "rten", "tract"])
    parser.add_argument("--onnx", type=pathlib.Path, default=CASES)
    options = parser.parse_args()
    op_of = {}
    for suite in SUITES:
        for folder in sorted((options.onnx / suite).iterdir()):
            if (folder / "model.onnx").exists():
                op_of[suite, folder.name] = operator(folder)
    for engine in options.engines:
        report = run_engine(engine, options.onnx)
        cases = {(c["suite"], c["name"]): c for c in report["cases"]}
        missing = sorted(set(op_of) - set(cases))
        if missing:
            print(f"{engine}: {len(missing)} cases were not run, such as {missing[:3]}", file=sys.stderr)
        status = {key: cases[key]["status"] if key in cases else "unsupported" for key in op_of}
        result = measure.heading(f"bench/conformance.py --engines {engine}") | {
            "engine": engine, "version": report.get("version"), "rtol": 1e-3, "atol": 1e-7, **count(status.values()),
            "suites": {s: count(v for (suite, _), v in status.items() if suite == s) for s in SUITES},
            "per_op": {op: count(v for k, v in status.items() if op_of[k] == op) for op in sorted(set(op_of.values()))},
            "not_passed": {
                f"{suite}/{name}": f"{state}: {cases.get((suite, name), {}).get('detail', 'not run')}"[:200]
                for (suite, name), state in sorted(status.items()) if state != "passed"
            },
        }
        measure.write_result(f"conformance-{engine}.json", result)
        print(f"{engine}: {result['passed']} passed, {result['failed']} failed, {result['unsupported']} unsupported", file=sys.stderr)
    tables.render()


if __name__ == "__main__":
    main()
