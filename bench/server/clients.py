#!/usr/bin/env python3
"""Many clients against a running server, with the official `openai` package; prints a JSON summary.

    lighter serve model.gguf --port 8080 &
    pip install openai
    python bench/server/clients.py --url http://127.0.0.1:8080 --clients 64 --seconds 600

First one client checks chat, stream, completions, embeddings and the documented errors. Then `--clients` of them ask side
by side for `--seconds`: prompts and answers of mixed lengths, whole and streamed, some that go away in the middle, some
bodies that are too large. The exit code is 1 if anything but the documented 4xx and 503 was seen.
"""

import argparse
import collections
import http.client
import json
import random
import statistics
import sys
import threading
import time
import urllib.parse

import openai

WORDS = "river stone lantern quiet market seven orange glass winter bridge carries slowly under open window".split()


def check(client, model, embeddings):
    """The interface, one call at a time; gives the names of what failed with the reason."""
    failed = {}

    def case(name):
        def run(function):
            try:
                function()
            except Exception as error:  # every failure is a result here
                failed[name] = f"{type(error).__name__}: {error}"

        return run

    messages = [{"role": "user", "content": "Name three colours."}]

    @case("chat")
    def _():
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=16)
        assert answer.choices[0].finish_reason in ("stop", "length"), answer
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    @case("seed")
    def _():
        texts = {
            client.chat.completions.create(model=model, messages=messages, max_tokens=16, seed=7).choices[0].message.content
            for _ in range(2)
        }
        assert len(texts) == 1, texts

    @case("stream")
    def _():
        whole = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
        parts = list(
            client.chat.completions.create(
                model=model, messages=messages, max_tokens=16, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
        assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == whole.choices[0].message.content, (text, whole.choices[0].message.content)

    @case("logprobs")
    def _():
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=4, logprobs=True, top_logprobs=3)
        content = answer.choices[0].logprobs.content
        assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content), content

    @case("json_schema")
    def _():
        schema = {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}, "warm": {"type": "boolean"}},
            "required": ["colour", "warm"],
            "additionalProperties": False,
        }
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        )
        value = json.loads(answer.choices[0].message.content)
        assert set(value) == {"colour", "warm"}, value

    @case("completions")
    def _():
        answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, logprobs=2)
        assert len(answer.choices[0].logprobs.tokens) <= 8, answer
        parts = list(client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, stream=True))
        assert parts[-1].choices[0].finish_reason in ("stop", "length"), parts[-1]

    @case("models")
    def _():
        assert [entry.id for entry in client.models.list()] == [model]

    if embeddings:

        @case("embeddings")
        def _():
            # The package asks for base64 unless told otherwise.
            coded = client.embeddings.create(model=model, input=["one", "two"])
            plain = client.embeddings.create(model=model, input=["one", "two"], encoding_format="float")
            for a, b in zip(coded.data, plain.data):
                assert max(abs(x - y) for x, y in zip(a.embedding, b.embedding)) < 1e-6
                assert abs(sum(x * x for x in b.embedding) - 1) < 1e-4

    def refused(name, kind, **request):
        @case(name)
        def _():
            try:
                client.chat.completions.create(**{"model": model, "messages": messages, "max_tokens": 4, **request})
            except kind:
                return
            raise AssertionError("it was not refused")

    refused("unknown model", openai.NotFoundError, model="no such model")
    refused("n = 2", openai.BadRequestError, n=2)
    refused("no messages", openai.BadRequestError, messages=[])
    refused("temperature out of range", openai.BadRequestError, temperature=1000)
    refused("context overflow", openai.BadRequestError, max_tokens=10**9)
    refused("unknown field", openai.BadRequestError, extra_body={"no_such_field": 1})
    return failed


class Load:
    def __init__(self, arguments):
        self.arguments = arguments
        self.lock = threading.Lock()
        self.ends = collections.Counter()
        self.unexpected = []
        self.first_token_s = []
        self.between_s = []
        self.tokens = 0

    def note(self, what):
        with self.lock:
            self.ends[what] += 1

    def oversize(self):
        url = urllib.parse.urlsplit(self.arguments.url)
        connection = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=120)
        headers = {"authorization": "Bearer " + self.arguments.api_key, "content-type": "application/json"}
        body = b'{"prompt": "' + b"x" * self.arguments.oversize_bytes + b'"}'
        connection.request("POST", "/v1/completions", body, headers)
        status = connection.getresponse().status
        connection.close()
        self.note(f"oversize {status}")
        if status not in (413, 503):
            self.unexpected.append(f"oversize body: {status}")

    def client(self, seed, until):
        rng = random.Random(seed)
        client = openai.OpenAI(base_url=self.arguments.url + "/v1", api_key=self.arguments.api_key, max_retries=0, timeout=600)
        while time.monotonic() < until:
            try:
                self.ask(client, rng)
            except openai.APIStatusError as error:
                self.note(f"status {error.status_code}")
                if error.status_code in (429, 503):
                    time.sleep(min(5.0, float(error.response.headers.get("retry-after", 1))))
                elif not 400 <= error.status_code < 500:
                    self.unexpected.append(str(error))
            except Exception as error:  # a broken connection is a result, not a reason to stop
                self.note(type(error).__name__)
                self.unexpected.append(f"{type(error).__name__}: {error}")

    def ask(self, client, rng):
        kind = rng.random()
        if kind < 0.03:
            self.oversize()
            return
        words = rng.choice([5, 20, 80, 300])
        text = " ".join(rng.choice(WORDS) for _ in range(words))
        request = {
            "model": self.arguments.model,
            "messages": [{"role": "system", "content": "You write short stories."}, {"role": "user", "content": text}],
            "max_tokens": rng.choice([4, 16, 64, 128]),
            "seed": rng.randrange(2**31),
        }
        if kind < 0.25:
            answer = client.chat.completions.create(**request)
            with self.lock:
                self.tokens += answer.usage.completion_tokens
            self.note("whole")
            return
        leaves = kind < 0.40
        start = last = time.monotonic()
        count = 0
        between = []
        with client.chat.completions.create(stream=True, **request) as stream:
            for part in stream:
                if not part.choices or not part.choices[0].delta.content:
                    continue
                now = time.monotonic()
                if count == 0:
                    with self.lock:
                        self.first_token_s.append(now - start)
                else:
                    between.append(now - last)
                last = now
                count += 1
                if leaves and count >= 3:
                    break
        with self.lock:
            self.tokens += count
            self.between_s.extend(between)
        self.note("left" if leaves and count >= 3 else "streamed")

    def run(self):
        until = time.monotonic() + self.arguments.seconds
        threads = [threading.Thread(target=self.client, args=(seed, until)) for seed in range(self.arguments.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def quantiles(values):
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "count": len(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", help="default: what /v1/models says")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--oversize-bytes", type=int, default=8 << 20)
    parser.add_argument("--no-embeddings", action="store_true")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url + "/v1", api_key=arguments.api_key, max_retries=0, timeout=600)
    arguments.model = arguments.model or next(iter(client.models.list())).id
    failed = check(client, arguments.model, not arguments.no_embeddings)
    load = Load(arguments)
    start = time.monotonic()
    load.run()
    elapsed = time.monotonic() - start
    summary = {
        "schema": "lightering.bench.server/1",
        "model": arguments.model,
        "clients": arguments.clients,
        "seconds": elapsed,
        "interface_failed": failed,
        "ends": dict(load.ends),
        "unexpected": load.unexpected[:20],
        "unexpected_count": len(load.unexpected),
        "answer_tokens_per_second": load.tokens / elapsed,
        "first_token_s": quantiles(load.first_token_s),
        "inter_token_s": quantiles(load.between_s),
        "openai": openai.__version__,
    }
    print(json.dumps(summary, indent=2))
    return 1 if failed or load.unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
