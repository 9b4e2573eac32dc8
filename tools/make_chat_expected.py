#!/usr/bin/env python3
"""Makes crates/lm/tests/golden/chat_templates.json: what Jinja 2 (the original), in the environment of Hugging Face's
apply_chat_template, writes for the templates that tools/fetch_test_data.sh fetches. Needs `pip install jinja2`.
With --texts FILE the texts themselves are written too; the golden file keeps their SHA-256."""
import datetime
import hashlib
import json
import os
import pathlib
import re
import sys

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2024, 7, 26, 9, 5, 3, tzinfo=datetime.timezone.utc)


class Refusal(Exception):
    """What a template says about a conversation that it does not take."""


def raise_exception(message):
    raise Refusal(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = NOW.strftime
    return made


TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a <city> & \"more\"",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "description": "The city"}, "days": {"type": "integer", "description": "How many"}},
        "required": ["city"]}}}]
CALL = {"id": "call00001", "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}
CASES = {
    "user": {"messages": [{"role": "user", "content": "Hello, \"world\"!"}], "add_generation_prompt": True},
    "system": {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n there "},
        {"role": "assistant", "content": "Good day."}, {"role": "user", "content": "And 2 < 3 & <b>?"}],
        "add_generation_prompt": True},
    "closed": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
               "add_generation_prompt": False},
    "tools": {"messages": [{"role": "user", "content": "Weather in Zürich?"}], "tools": TOOLS,
              "add_generation_prompt": True},
    "called": {"messages": [
        {"role": "user", "content": "Weather in Zürich?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "{\"rain\": 0.5}", "name": "get_weather", "tool_call_id": "call00001"}],
        "tools": TOOLS, "add_generation_prompt": True},
}

data = pathlib.Path(os.environ.get("LIGHTER_TEST_DATA", pathlib.Path.home() / ".cache/lighter-test-data"))
golden = pathlib.Path(__file__).parent.parent / "crates/lm/tests/golden/chat_templates.json"
texts, hashes = {}, {}
for path in sorted((data / "tokenizers/templates").glob("*.jinja")):
    source = path.read_bytes().decode()
    # Transformers knows these tags; to write a conversation they mean nothing.
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    for name, case in CASES.items():
        try:
            text = environment().from_string(source).render(bos_token="<s>", eos_token="</s>", **case)
            digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        except Refusal:
            text, digest = None, "refused"
        except Exception as error:  # noqa: BLE001 (a mistake of the template; nothing is expected then)
            print(f"{path.stem} {name}: {type(error).__name__}: {error}"[:150], file=sys.stderr)
            text, digest = None, None
        texts.setdefault(path.stem, {})[name] = text
        hashes.setdefault(path.stem, {})[name] = digest
golden.parent.mkdir(exist_ok=True)
golden.write_text(json.dumps({"cases": CASES, "expected": hashes}, indent=1, ensure_ascii=False) + "\n")
if "--texts" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--texts") + 1]).write_text(json.dumps(texts, ensure_ascii=False))
