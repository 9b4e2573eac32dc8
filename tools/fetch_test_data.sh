#!/bin/sh
# Puts test data from packages where `lighter conformance` and the test suites look for it, under $LIGHTER_TEST_DATA
# (default ~/.cache/lighter-test-data):
#   onnx-1.18.0/onnx/backend/test/data  the ONNX backend cases; 1.18.0 is the newest wheel that carries the node cases
#   tokenizers                          vocabularies with texts and their expected ids, and chat templates, from llama.cpp
set -eu
data=${LIGHTER_TEST_DATA:-$HOME/.cache/lighter-test-data}

target=$data/tokenizers
if [ -f "$target/ggml-vocab-qwen2.gguf.out" ] && [ -d "$target/templates" ]; then
    echo "already there: $target"
else
    mkdir -p "$data/dl"
    python3 -m pip download -q --no-deps --no-binary llama-cpp-python -d "$data/dl" llama-cpp-python==0.3.36
    python3 - "$data/dl/llama_cpp_python-0.3.36.tar.gz" "$target" <<'PYTHON'
import pathlib, sys, tarfile
target = pathlib.Path(sys.argv[2])
models = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/"
with tarfile.open(sys.argv[1]) as archive:
    for member in archive:
        name = member.name.removeprefix(models)
        wanted = name.startswith("ggml-vocab-") or (name.startswith("templates/") and name.endswith(".jinja"))
        if member.isfile() and member.name.startswith(models) and wanted and ".." not in name:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(member).read())
PYTHON
    echo "tokenizers: $target"
fi

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
