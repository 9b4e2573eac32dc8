#!/usr/bin/env python3
"""Peak resident memory of load and run, against weights x 1.05 + 20 MB + planned activations, the others beside it.

    cargo build --release -p lightering ; (cd bench/peers && cargo build --release)
    bench/memory.py [--threads 1]

One process per engine and model, one warm-up and one run; the figure is the kernel's VmHWM of the whole process, and, for
each, the same less what the process held before it opened the model (Python and its libraries for onnxruntime).
"Planned activations" is the arena of lighter's receipt less the weights that lie in it (`plan.arena_bytes` -
`plan.weights_resident_bytes`); "weights" are the bytes of the file's initializers.
Writes bench/results/memory.json and renders docs/performance.md.
"""

import argparse
import pathlib
import sys
import tempfile

import lighter
import measure
import onnx
import tables


def weight_bytes(model):
    graph = onnx.load(measure.model_path(model)).graph
    total = 0
    for tensor in graph.initializer:
        count = 1
        for dim in tensor.dims:
            count *= dim
        total += count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=list(measure.MODELS))
    options = parser.parse_args()
    result = measure.heading(f"bench/memory.py --threads {options.threads}") | {"threads": options.threads, "models": {}}
    for model in measure.available(options.models):
        row = {"weight_bytes": weight_bytes(model), "engines": {}}
        for engine in measure.PROGRAMS:
            with tempfile.TemporaryDirectory() as folder:
                report = measure.run_peer(engine, model, options.threads, 1, 1, pathlib.Path(folder))
            keep = ("error", "version", "peak_resident_bytes", "fixed_resident_bytes", "load_seconds")
            row["engines"][engine] = {k: report[k] for k in keep if k in report}
        if measure.LIGHTER.exists():
            done = lighter.run(model, options.threads)
            if done["exit_code"] == 0 and done["receipt"]:
                receipt = done["receipt"]
                row["engines"]["lighter"] = {
                    "version": receipt["version"], "peak_resident_bytes": receipt["measured"]["peak_resident_bytes"],
                    "fixed_resident_bytes": receipt["measured"]["fixed_bytes"],
                    "load_seconds": receipt["measured"]["load_seconds"],
                }
                plan = receipt["plan"]
                row["planned_activation_bytes"] = plan["arena_bytes"] - plan["weights_resident_bytes"]
                row["arena_lower_bound_bytes"] = plan["arena_lower_bound_bytes"] - plan["weights_resident_bytes"]
                row["bound_bytes"] = int(row["weight_bytes"] * 1.05 + 20e6 + row["planned_activation_bytes"])
                row["within_bound"] = receipt["measured"]["peak_resident_bytes"] <= row["bound_bytes"]
            else:
                row["engines"]["lighter"] = {"error": done["message"]}
        result["models"][model] = row
        print(model, {e: r.get("peak_resident_bytes", r.get("error")) for e, r in row["engines"].items()}, file=sys.stderr)
    measure.write_result("memory.json", result)
    tables.render()


if __name__ == "__main__":
    main()
