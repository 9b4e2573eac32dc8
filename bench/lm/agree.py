#!/usr/bin/env python3
"""Small random models of every family: tokens and log-probabilities of lighter beside those of llama.cpp.

    python bench/lm/agree.py --lighter target/release/lighter [--format F32]

Needs the package xllamacpp, which is llama.cpp as a Python wheel. For every family, `lighter lm synth --tiny` writes a
model; both programs continue the same prompts with the likeliest tokens. Compared are the log-probabilities of the
tokens that both list, at each step up to the first where they take different tokens; there, what both say of the two
tokens must lie within the tolerance of each other, since then either is right. Exit code 1: a difference is larger.

The weights and both caches are 32-bit floats, so that only the order of additions differs and a small tolerance shows
a small mistake. With --format F16, llama.cpp rounds activations to 16 bits and lighter does not; with weights in
blocks, both round them to 8 bits: either needs a larger --tolerance.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

# What is compared: the model to be like, and options of both programs that matter to it.
CASES = [
    ("llama-3.2-1b", {}),
    ("mistral-7b", {}),
    ("smollm2-135m", {}),
    ("mixtral-8x7b", {}),
    ("qwen2.5-0.5b", {}),
    ("qwen1.5-moe-a2.7b", {}),
    ("qwen2-57b-a14b", {}),
    ("qwen3-0.6b", {}),
    ("qwen3-30b-a3b", {}),
    ("gemma-2b", {}),
    ("gemma-2-2b", {}),
    ("gemma-3-1b", {}),
    ("phi-3-mini", {"context": 512}),
    ("phi-3-mini", {"context": 256}),
    ("phi-3.5-moe", {"context": 512}),
    ("phi-3.5-moe", {"context": 256}),
    ("gpt2", {}),
    ("granite-2b", {}),
    ("granite-3b-a800m", {}),
    ("olmoe-1b-7b", {}),
    ("deepseek-v2-lite", {}),
    ("deepseek-v2-lite-expanded", {}),
    ("smallthinker-4b-a0.6b", {}),
    ("smallthinker-21b-a3b", {}),
]
PROMPTS = [
    "The quick brown fox jumps over the lazy dog.",
    "fn main() { println!(\"{}\", 6 * 7); }",
    "Grüße aus Zürich! 你好,世界",
    "a",
    "0123456789 " * 17,
]
TOKENS = 12
LISTED = 20
# Both may only take these tokens: llama.cpp tells no probabilities while its text ends within a character. What is
# told of a token is its probability among all. The text is longer than the answers, so that it cannot end early.
ALLOWED = "[a-z0-9 ]{64,}"
VOCABULARY = 320
# The id of a byte in the synthetic tokenizer is the byte; 258 is "th".
ALLOWED_IDS = set(b"abcdefghijklmnopqrstuvwxyz0123456789 ") | {258}
# llama.cpp takes GELU from a table of 16-bit floats (GGML_GELU_FP16), which alone changes the fourth digit of every
# activation.
GELU = ("gemma", "gemma2", "gemma3", "gpt2")


def lighter(program, model, prompt, context):
    """Ids of the answer, and for each the listed log-probabilities by id."""
    command = [program, "generate", model, prompt, "--json", "--temperature", "0", "--ignore-end", "--threads", "2",
               "--tokens", str(TOKENS), "--logprobs", str(LISTED), "--context", str(context), "--cache", "f32",
               "--regex", ALLOWED]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-300:])
    answer = json.loads(done.stdout)
    return [(t["id"], {int(i): p for i, p in t["top"]} | {t["id"]: t["log_probability"]}) for t in answer["tokens"]]


def reference(model, context):
    """The same of llama.cpp, for all prompts: in a process of its own, since it may abort."""
    done = subprocess.run([sys.executable, __file__, "--reference", model, str(context)], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(done.stderr.strip()[-300:] or f"llama.cpp ended with {done.returncode}")
    answers = json.loads(lines[-1][len("ANSWER "):])
    return [[(i, {int(k): v for k, v in top.items()}) for i, top in answer] for answer in answers]


def run_reference(model, context):
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path = model
    p.n_ctx = context
    p.n_parallel = 1
    p.cpuparams.n_threads = 2
    p.cpuparams_batch.n_threads = 2
    p.warmup = False
    p.verbosity = -1
    kinds = xllamacpp.ggml_type
    p.cache_type_k = kinds.GGML_TYPE_F32
    p.cache_type_v = kinds.GGML_TYPE_F32
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(p)
    answers = []
    for prompt in PROMPTS:
        request = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": LISTED, "ignore_eos": True,
                   "cache_prompt": False, "logit_bias": [[i, False] for i in range(VOCABULARY) if i not in ALLOWED_IDS]}
        answer = server.handle_completions(request)
        if isinstance(answer, (str, bytes)):
            answer = json.loads(answer)
        if os.environ.get("AGREE_DEBUG"):
            print(json.dumps(answer)[:2000], file=sys.stderr)
        choice = answer["choices"][0] if "choices" in answer else answer
        probabilities = choice.get("logprobs") or choice
        listed = probabilities.get("content") or probabilities.get("completion_probabilities") or []
        answers.append([(t["id"], {o["id"]: o["logprob"] for o in t["top_logprobs"]} | {t["id"]: t["logprob"]}) for t in listed])
    print("\nANSWER " + json.dumps(answers), flush=True)
    # Its threads may not end by themselves.
    os._exit(0)


def compare(ours, theirs):
    """The largest difference of what both list, steps compared, and steps where the tokens differ."""
    largest, steps, parted = 0.0, 0, 0
    if len(ours) != TOKENS:
        raise RuntimeError(f"lighter tells {len(ours)} tokens, not {TOKENS}")
    for (a, of_a), (b, of_b) in zip(ours, theirs):
        steps += 1
        both = set(of_a) & set(of_b)
        if not both:
            return math.inf, steps, 1
        largest = max([largest] + [abs(of_a[i] - of_b[i]) for i in both])
        if a != b:
            parted += 1
            # Either is right where both programs find them about as likely.
            largest = max(largest, abs(of_a[a] - of_a.get(b, -math.inf)), abs(of_b[b] - of_b.get(a, -math.inf)))
            break
    return largest, steps, parted


def main():
    if sys.argv[1:2] == ["--reference"]:
        return run_reference(sys.argv[2], int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lighter", default="target/release/lighter")
    parser.add_argument("--format", default="F32", help="of the weights")
    parser.add_argument("--tolerance", type=float, default=0.002, help="largest difference of log-probabilities")
    parser.add_argument("--tolerance-gelu", type=float, default=0.02, help="the same for models with GELU")
    parser.add_argument("--like", action="append", help="only this model, may be repeated")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    missed = 0
    print("| shape | architecture | context | steps | largest difference | tolerance | agrees |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for like, options in CASES:
            if arguments.like and like not in arguments.like:
                continue
            context = options.get("context", 512)
            model = os.path.join(folder, f"{like}.gguf")
            made = subprocess.run(
                [arguments.lighter, "lm", "synth", "--like", like, "--tiny", "--format", arguments.format,
                 "--seed", str(arguments.seed), "--output", model, "--json"],
                check=True, capture_output=True, text=True)
            architecture = json.loads(made.stdout)["architecture"]
            tolerance = arguments.tolerance_gelu if architecture in GELU else arguments.tolerance
            try:
                theirs = reference(model, context)
                short = [len(answer) for answer in theirs if len(answer) != TOKENS]
                if short:
                    raise RuntimeError(f"llama.cpp tells {short} tokens with probabilities, not {TOKENS}")
                ours = [lighter(arguments.lighter, model, prompt, context) for prompt in PROMPTS]
                results = [compare(a, b) for a, b in zip(ours, theirs)]
                largest = max(r[0] for r in results)
                steps, parted = sum(r[1] for r in results), sum(r[2] for r in results)
                told = f"{steps}" + (f", {parted} parted" if parted else "")
                verdict = largest <= tolerance
                print(f"| {like} | {architecture} | {context} | {told} | {largest:.2g} | {tolerance:g} | {'yes' if verdict else 'NO'} |")
            except RuntimeError as error:
                verdict = False
                print(f"| {like} | {architecture} | {context} | | {str(error)!r} | {tolerance:g} | NO |")
            sys.stdout.flush()
            missed += not verdict
            os.remove(model)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
