"""forge-sample --web: the page answers, and neither it nor the server talks to another machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytest.importorskip("gradio")
WATCHED = """
import signal
import sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores

def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        host = args[0] if event == "socket.getaddrinfo" else args[1]
        print("TRAFFIC", host[0] if isinstance(host, tuple) else host, flush=True)

sys.addaudithook(watch)
from sampler import cli

cli.sample()
"""


@contextmanager
def served(run: Path, *options: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a page, and all that its server prints, once it has ended by Ctrl-C."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    # A proxy, which gradio would ask for its own server, and which is not there.
    environment = os.environ | {"http_proxy": "http://192.0.2.1:9", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(run), "--web", "--port", str(port), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    said: list[str] = []
    url = f"http://127.0.0.1:{port}"
    try:
        for line in process.stdout:
            said.append(line)
            if url in line:
                break
        assert process.poll() is None, said
        yield url, said
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        said += rest.splitlines()
        assert process.returncode == 0, said
    finally:
        process.kill()
        process.wait()


def texts_of(url: str, name: str, *data: Any) -> list[str]:
    """What a call of the page's API gives, one text after the other."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(
        f"{url}/gradio_api/call/{name}",
        json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.load(opener.open(request))["event_id"]
    lines = opener.open(f"{url}/gradio_api/call/{name}/{event}").read().decode().splitlines()
    found = [json.loads(line.removeprefix("data: ")) for line in lines if "data: [" in line]
    return [text for (text, *_) in found]


def test_the_page_answers_and_its_server_talks_to_this_machine_only(chat_run: Path) -> None:
    with served(chat_run, "--temperature", "0") as (url, said):
        answers = texts_of(url, "answer", "Who are you?", 0, 1)
        assert answers[-1] == "A small model."
        assert len({*answers}) > 2  # it streams
        assert texts_of(url, "answer", "Who are you?", 2, 0.05)[-1] == "A small model."
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url) as page:
            assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    traffic = {line.split()[1] for line in said if line.startswith("TRAFFIC")}
    assert traffic == {"127.0.0.1"}
    assert not [line for line in said if "Traceback" in line]


def test_a_base_model_has_a_text_box(chat_run: Path) -> None:
    with served(chat_run, "--base", "--max-tokens", "5") as (url, _):
        texts = texts_of(url, "continued", "The moon", 1, 1)
        assert texts[-1].startswith("The moon")
        assert len(texts[-1]) > len("The moon")


def test_a_port_that_is_taken_is_one_clear_error(chat_run: Path, forge) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = forge("sample", chat_run, "--web", "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "cannot serve the page" in result.output
