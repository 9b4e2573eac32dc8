#!/usr/bin/env python3
"""The likeliest tokens of a language model, ours beside those of native llama.cpp, on twenty prompts.

    LLAMA_BIN=DIR bench/lm/greedy.py MODEL.gguf [--tokens 200]

`llama-completion` and `lighter generate` continue each prompt greedily. They are compared by their text, which
llama-completion writes, up to the first difference; from there on each goes its own way. The gap is how much likelier
lighter held its own token than that of llama.cpp there, in natural logarithms: where it is small, rounding decides, and
the two round activations and caches differently. The token of llama.cpp is the one among lighter's twenty likeliest
with which its text goes on, the likeliest of several; without such a token no gap is told.
Writes bench/results/lm-greedy-NAME.json and renders docs/performance.md.
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
LISTED = 20
END = " [end of text]"
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "The three laws of thermodynamics are:\n1.",
    "def fibonacci(n):\n    ",
    "// Returns the greatest common divisor of a and b.\nfn gcd(a: u64, b: u64) -> u64 {\n",
    "SELECT name, COUNT(*) FROM orders",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the boiling point of water at sea level?\nA:",
    "import numpy as np\n\ndef softmax(x):\n",
    "In 1969, the first human",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of sugar\n",
    "The mitochondria is the powerhouse of the cell because",
    "Die Hauptstadt von Deutschland ist",
    "La théorie de la relativité",
    "#include <stdio.h>\n\nint main(void) {\n",
    "To be, or not to be, that is",
    "<!DOCTYPE html>\n<html>\n<head>\n<title>",
    "The difference between a stack and a queue is",
    "1, 1, 2, 3, 5, 8, 13,",
    "class LinkedList:\n    def __init__(self):\n",
]


def run(command, stdin=None):
    done = subprocess.run([str(c) for c in command], capture_output=True, input=stdin)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr.decode(errors='replace')[-400:]}")
    return done.stdout.decode(errors="replace")


def ours(options, prompt):
    out = run([measure.LIGHTER, "generate", options.model, prompt, "--json", "-q", "--temperature", 0, "--tokens",
               options.tokens, "--logprobs", LISTED, "--context", options.context, "--threads", options.threads])
    return json.loads(out)["tokens"]


def theirs(options, prompt):
    out = run([LLAMA / "llama-completion", "-m", options.model, "-t", options.threads, "-p", prompt, "--no-escape", "-n",
               options.tokens, "-c", options.context, "--no-warmup", "-no-cnv", "--no-display-prompt", "--temp", 0,
               "--seed", 1, "--simple-io"])
    ended = END in out
    return (out.split(END)[0] if ended else out.removesuffix("\n\n")).rstrip("\ufffd"), ended


def decode(options, ids):
    return run([measure.LIGHTER, "tokenize", options.model, "--decode", ",".join(map(str, ids))]).removesuffix("\n")


def compare(options, prompt):
    tokens, (other, ended) = ours(options, prompt), theirs(options, prompt)
    text = "".join(t["text"] for t in tokens).rstrip("\ufffd")
    common = len(os.path.commonprefix([text, other]))
    row = {"prompt": prompt, "tokens": len(tokens)}
    # At its end, a text may lack the rest of a character, or what white space is cut off.
    if not text[common:].strip() and (not other[common:].strip()):
        return row | {"equal": True}
    start = 0
    for index, token in enumerate(tokens):
        if start + len(token["text"]) > common:
            break
        start += len(token["text"])
    else:
        return row | {"equal": False, "first_difference": len(tokens)}
    row |= {"equal": False, "first_difference": index}
    rest, before = other[start:], [t["id"] for t in tokens[max(0, index - 1):index]]
    # How a token is spelled may depend on whether it is the first one.
    spelled_before = decode(options, before) if before else ""
    for candidate, logprob in token["top"]:
        if candidate == token["id"]:
            continue
        piece = decode(options, [*before, candidate]).removeprefix(spelled_before)
        if rest.startswith(piece) if piece else (ended and not rest):
            return row | {"gap": token["log_probability"] - logprob}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    words = [pathlib.Path(a).name if "/" in a else a for a in sys.argv[1:]]
    result = measure.heading(" ".join(["bench/lm/greedy.py", *words]))
    result |= {"model": options.model.stem, "tokens": options.tokens, "threads": options.threads, "prompts": []}
    for prompt in PROMPTS:
        row = compare(options, prompt)
        result["prompts"].append(row)
        gap = f", gap {row['gap']:.3f}" if "gap" in row else ""
        print("equal" if row["equal"] else f"differs at token {row['first_difference']}{gap}", repr(prompt), file=sys.stderr)
    rows = result["prompts"]
    result["equal"] = sum(r["equal"] for r in rows) / len(rows)
    gaps = [r["gap"] for r in rows if "gap" in r]
    result |= {"largest_gap": max(gaps, default=None), "median_gap": statistics.median(gaps) if gaps else None}
    print(f"{result['equal']:.0%} of the prompts are equal; largest gap {result['largest_gap']}", file=sys.stderr)
    measure.write_result(f"lm-greedy-{options.model.stem}.json", result)
    tables.render()


if __name__ == "__main__":
    main()
