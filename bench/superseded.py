#!/usr/bin/env python3
"""Which expected outputs of onnx 1.18.0's node cases does ONNX's own reference implementation contradict today?

    python3 -m venv newest && newest/bin/pip install onnx==1.23.2 numpy ml_dtypes
    newest/bin/python bench/superseded.py

Runs every node case through `onnx.reference` of a later release (whose wheels no longer carry the cases) and lists those
where it gives an answer that differs from the stored one by more than rounding (rtol 1e-3, atol 1e-4). Operators with
random outputs are left out. The reference has defects of its own (casts to 4-bit types, for example), so docs/conformance.md
counts a case as superseded only where onnxruntime contradicts the stored output too.
Writes bench/results/superseded-cases.json.
"""

import json
import os
import pathlib
import warnings

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

DATA = pathlib.Path(os.environ.get("LIGHTER_TEST_DATA", "~/.cache/lighter-test-data")).expanduser()
CASES = DATA / "onnx-1.18.0" / "onnx" / "backend" / "test" / "data" / "node"
RESULT = pathlib.Path(__file__).resolve().parent / "results" / "superseded-cases.json"
RANDOM = {"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Dropout"}


def read(path):
    return numpy_helper.to_array(onnx.load_tensor(path))


def close(expected, got):
    expected, got = np.asarray(expected), np.asarray(got)
    if expected.shape != got.shape:
        return False
    if expected.dtype.kind in "OUS":
        return [str(e) for e in expected.flatten()] == [str(g) for g in got.flatten()]
    return np.allclose(got.astype(np.float64), expected.astype(np.float64), rtol=1e-3, atol=1e-4, equal_nan=True)


def main():
    warnings.simplefilter("ignore")
    superseded, unanswered, agreed = {}, 0, 0
    for folder in sorted(CASES.iterdir()):
        try:
            model = onnx.load(folder / "model.onnx")
            if RANDOM & {n.op_type for n in model.graph.node}:
                continue
            data = folder / "test_data_set_0"
            feed = {i.name: read(data / f"input_{k}.pb") for k, i in enumerate(model.graph.input)}
            expected = [read(data / f"output_{k}.pb") for k in range(len(model.graph.output))]
            answers = ReferenceEvaluator(model).run(None, feed)
            wrong = [k for k, (e, a) in enumerate(zip(expected, answers)) if not close(e, a)]
        except Exception:  # The reference has no answer to compare with: sequences, training, operators it lacks.
            unanswered += 1
            continue
        if not wrong:
            agreed += 1
            continue
        k = wrong[0]
        e, a = np.asarray(expected[k]), np.asarray(answers[k])
        numeric = e.shape == a.shape and e.dtype.kind not in "OUS"
        superseded[folder.name] = {
            "output": k, "largest_difference": float(np.nanmax(np.abs(e.astype(np.float64) - a.astype(np.float64)))) if numeric else None,
        }
    report = {"schema": 1, "cases_from": "1.18.0", "reference": onnx.__version__, "agreed": agreed, "unanswered": unanswered,
              "contradicted": superseded}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{agreed} agree, {len(superseded)} contradicted, {unanswered} without an answer")


if __name__ == "__main__":
    main()
