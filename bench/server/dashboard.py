#!/usr/bin/env python3
"""Opens the dashboard of a running server in headless Chromium and checks what it shows.

    lighter serve model.gguf --port 8080 &
    python bench/server/dashboard.py --url http://127.0.0.1:8080 --screenshot dashboard.png

Asks for an answer first, so that there is something to show. The exit code is 1 when a figure is missing, or when the page
asked for anything from another host.
"""

import argparse
import html
import json
import re
import subprocess
import sys
import tempfile
import urllib.request


def chromium(arguments, *flags, dark=False):
    with tempfile.TemporaryDirectory() as profile:
        command = [
            arguments.chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
            "--no-first-run", "--disable-background-networking", f"--window-size={arguments.size}", *flags,
        ]
        if dark:
            command.append("--blink-settings=preferredColorScheme=0")
        # Long enough in the page's own time for the second answer, from which rates come.
        command += ["--virtual-time-budget=4000", arguments.url + "/"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--screenshot", help="also write a picture, and one in dark colours beside it")
    parser.add_argument("--size", default="1200,1000")
    arguments = parser.parse_args()
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 32}).encode()
    request = urllib.request.Request(arguments.url + "/v1/completions", body, {"content-type": "application/json"})
    model = json.load(urllib.request.urlopen(request, timeout=300))["model"]
    state = json.load(urllib.request.urlopen(arguments.url + "/dashboard/state"))
    page = chromium(arguments, "--dump-dom")

    def shown(name):
        found = re.search(rf'id="{name}"[^>]*>(.*?)</(?:div|span)>', page, re.S)
        return html.unescape(re.sub(r"<[^>]+>", "", found.group(1))).strip() if found else ""

    problems = []
    if shown("model") != model:
        problems.append(f"the model is {shown('model')!r}, expected {model!r}")
    for name in ["tps", "pps", "run", "batch", "ttft", "itl", "prefix", "read", "stall", "pages", "requests"]:
        if not re.search(r"\d", shown(name)):
            problems.append(f"{name} shows {shown(name)!r}, expected a figure")
    if state["status"]["experts"] and "in memory" not in shown("experts-note"):
        problems.append("the map of experts is missing")
    if state["status"]["memory_used"] is not None and not re.search(r"\d", shown("memory")):
        problems.append("the memory is missing")
    if "polyline" not in page:
        problems.append("there are no charts")
    if arguments.screenshot:
        stem, _, ending = arguments.screenshot.rpartition(".")
        chromium(arguments, f"--screenshot={arguments.screenshot}")
        chromium(arguments, f"--screenshot={stem}-dark.{ending}", dark=True)
    figures = {name: shown(name) for name in ["model", "about", "tps", "run", "ttft", "itl", "prefix", "pages", "memory", "experts-note"]}
    print(json.dumps({"schema": "lightering.bench.dashboard/1", "figures": figures, "problems": problems}, indent=2))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
