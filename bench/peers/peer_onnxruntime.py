#!/usr/bin/env python3
"""onnxruntime behind the commands of the Rust peers.

latency: one model, one process, one line of JSON. conformance: the ONNX backend cases of a folder; a case is
"unsupported" when onnxruntime refuses it with an error and "failed" when it answers otherwise than expected.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import onnxruntime


def peak_resident_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def read_value(path, type_proto):
    """One input or output of a backend case, as onnxruntime takes or gives it."""
    raw = path.read_bytes()
    if type_proto.HasField("optional_type"):
        value = onnx.OptionalProto.FromString(raw)
        return onnx.numpy_helper.to_optional(value)
    if type_proto.HasField("sequence_type"):
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(raw))
    array = onnx.numpy_helper.to_array(onnx.TensorProto.FromString(raw))
    return array


def differs(expected, got):
    """Why `got` is not `expected`, or None."""
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return "another sequence"
        return next((why for e, g in zip(expected, got) if (why := differs(e, g))), None)
    if expected is None or got is None:
        return None if expected is got else "another kind of value"
    expected, got = np.asarray(expected), np.asarray(got)
    if expected.shape != got.shape:
        return f"shape {got.shape} instead of {expected.shape}"
    if expected.dtype.kind in "OUS":
        strings = lambda a: [s.decode() if isinstance(s, bytes) else str(s) for s in a.flatten()]
        return None if strings(expected) == strings(got) else "strings differ"
    if expected.dtype != got.dtype:
        return f"type {got.dtype} instead of {expected.dtype}"
    with np.errstate(all="ignore"):
        if np.allclose(got.astype(np.float64), expected.astype(np.float64), rtol=1e-3, atol=1e-7, equal_nan=True):
            return None
    return "elements differ"


def conformance_case(folder):
    graph = onnx.load(folder / "model.onnx").graph
    initializers = {i.name for i in graph.initializer}
    declared = [i for i in graph.input if i.name not in initializers]
    try:
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each kind of refusal.
        return "unsupported", str(error)
    for data in sorted(folder.glob("test_data_set_*")):
        try:
            feed = {i.name: read_value(data / f"input_{k}.pb", i.type) for k, i in enumerate(declared)
                    if (data / f"input_{k}.pb").exists()}
            expected = [read_value(data / f"output_{k}.pb", o.type) for k, o in enumerate(graph.output)
                        if (data / f"output_{k}.pb").exists()]
            answers = session.run(None, feed)
        except Exception as error:
            return "unsupported", str(error)
        for k, (e, g) in enumerate(zip(expected, answers)):
            if why := differs(e, g):
                return "failed", f"output {k}: {why}"
    return "passed", ""


def conformance(arguments):
    # Imported here, so that the memory of `latency` is onnxruntime's alone.
    global onnx
    import onnx

    onnxruntime.set_default_logger_severity(4)
    cases = []
    for suite in ("node", "simple", "pytorch-operator", "pytorch-converted"):
        for folder in sorted((arguments.onnx / suite).iterdir()):
            if (folder / "model.onnx").exists():
                status, detail = conformance_case(folder)
                cases.append({"suite": suite, "name": folder.name, "status": status, "detail": detail[:300]})
    report = {"engine": "onnxruntime", "version": onnxruntime.__version__, "cases": cases}
    arguments.json.write_text(json.dumps(report)) if arguments.json else print(json.dumps(report))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["latency", "conformance"])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--input", action="append", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--output-dir", type=pathlib.Path)
    parser.add_argument("--onnx", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--timeout", help="accepted for the Rust peers' sake; cases run in this process")
    arguments = parser.parse_args()
    if arguments.command == "conformance":
        return conformance(arguments)
    feed = {name: np.load(file) for name, file in (i.split("=", 1) for i in arguments.input)}
    fixed = peak_resident_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    options.inter_op_num_threads = 1
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(arguments.model, options, providers=["CPUExecutionProvider"])
    load_seconds = time.perf_counter() - start
    names = [o.name for o in session.get_outputs()]
    for _ in range(arguments.warmup):
        session.run(names, feed)
    run_seconds, cpu = [], time.process_time()
    for _ in range(arguments.runs):
        start = time.perf_counter()
        answers = session.run(names, feed)
        run_seconds.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / max(arguments.runs, 1)
    peak, files = peak_resident_bytes(), {}
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        for index, (name, answer) in enumerate(zip(names, answers)):
            files[name] = str(arguments.output_dir / f"{index}.npy")
            np.save(files[name], answer)
    json.dump({
        "engine": "onnxruntime", "version": onnxruntime.__version__, "model": arguments.model,
        "threads": arguments.threads, "load_seconds": load_seconds, "run_seconds": run_seconds,
        "cpu_seconds_per_run": cpu, "fixed_resident_bytes": fixed, "peak_resident_bytes": peak, "outputs": files,
    }, sys.stdout)
    print()


if __name__ == "__main__":
    main()
