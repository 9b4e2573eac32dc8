#!/bin/sh
# Puts the ONNX backend test cases where `lighter conformance` and the test suites look for them:
# $LIGHTER_TEST_DATA/onnx-1.18.0/onnx/backend/test/data (default ~/.cache/lighter-test-data).
# onnx 1.18.0 is the newest wheel that carries the node cases.
set -eu
data=${LIGHTER_TEST_DATA:-$HOME/.cache/lighter-test-data}
target=$data/onnx-1.18.0
if [ -d "$target/onnx/backend/test/data/node" ]; then
    echo "already there: $target"
    exit 0
fi
mkdir -p "$data/dl"
# One fixed wheel, whatever Python runs this: the cases inside are the same in all of them.
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --platform manylinux2014_x86_64 \
    -d "$data/dl" onnx==1.18.0
python3 - "$data/dl" "$target" <<'PYTHON'
import pathlib, sys, zipfile
(wheel,) = list(pathlib.Path(sys.argv[1]).glob("onnx-1.18.0-*.whl"))[:1]
with zipfile.ZipFile(wheel) as archive:
    cases = [n for n in archive.namelist() if n.startswith("onnx/backend/test/data/")]
    archive.extractall(sys.argv[2], cases)
PYTHON
echo "ONNX backend cases: $target/onnx/backend/test/data"
