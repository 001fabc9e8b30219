"""Fixtures of all tests: the stages as modules, a tiny GLM-4.5 tokenizer, real logs where a checkout has them."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from scripted import raw, render, say, write_tasks

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: starts vLLM (about a minute each)")
    config.addinivalue_line("markers", "demo: runs recipes/demo/run.sh, the whole recipe (minutes)")
    config.addinivalue_line("markers", "kills: kills runs of 03 twenty times, of 04 ten times (half a minute each)")


@pytest.fixture(scope="session")
def stage():
    """stage("03_sft") is the module."""
    return importlib.import_module


@pytest.fixture(scope="module")
def one_thread():
    """Models as small as the tests' take five times the CPU on two threads, which wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_stage():
    """Run a stage as a user does: run_stage("02_format_trajectories.py", *flags) -> CompletedProcess with text."""

    def run(script, *flags, **kwargs):
        kwargs = {"cwd": ROOT, "timeout": 600} | kwargs
        return subprocess.run(
            [sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True, **kwargs
        )

    return run


@pytest.fixture(scope="session")
def one_line_error():
    """Assert that a run ended as a user's mistake must: exit code 2, one line on stderr, no traceback."""

    def check(result, *parts):
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert result.returncode == 2, (result.returncode, result.stderr)
        assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
        for part in parts:
            assert part in lines[0], lines[0]

    return check


@pytest.fixture(scope="session")
def make_model():
    """The demo's make_model.py as a module."""
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "recipes/demo/make_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shared():
    """Real logs and benchmark files beside a developer's checkout; a user's clone has none."""
    path = ROOT.parent / "shared" / "data"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    return path


@pytest.fixture
def make_endpoint(tmp_path):
    """make_endpoint(port=0) -> a chat-completions server: .script maps a task's first query to its assistant messages
    in order; a function there answers (status, headers, text) itself. .requests holds every request body. With
    .is_vllm it gives token ids where they are asked for: the characters of render()."""

    servers = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send(self, status, headers, text):
            self.send_response(status)
            for key, value in (headers | {"content-length": str(len(text.encode()))}).items():
                self.send_header(key, value)
            self.end_headers()
            try:
                self.wfile.write(text.encode())
            except BrokenPipeError:
                pass  # the run was killed

        def do_GET(self):
            self.send(200, {}, json.dumps({"data": [{"owned_by": "vllm" if self.server.is_vllm else "me"}]}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/detokenize":
                return self.send(200, {}, json.dumps({"prompt": "".join(map(chr, body["tokens"]))}))
            self.server.requests.append(body)
            users = [message["content"] for message in body["messages"] if message["role"] == "user"]
            done = sum(message["role"] == "assistant" for message in body["messages"])
            turns = self.server.script.get(users[0]) or self.server.otherwise
            reply = turns(body) if callable(turns) else turns[done]
            if isinstance(reply, dict):
                stop = reply.pop("finish_reason", "tool_calls" if reply.get("tool_calls") else "stop")
                message = {"role": "assistant"} | reply
                usage = {"prompt_tokens": 10, "completion_tokens": 2}
                whole = {"choices": [{"message": message, "finish_reason": stop}], "usage": usage}
                if self.server.is_vllm and body.get("return_token_ids"):
                    whole["prompt_token_ids"] = [ord(c) for c in render(body["messages"])]
                    whole["choices"][0]["token_ids"] = [ord(c) for c in raw(message)]
                reply = 200, {}, json.dumps(whole)
                time.sleep(self.server.delay)
            self.send(*reply)

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

    def make(port=0):
        server = Server(("127.0.0.1", port), Handler)
        server.script, server.requests, server.delay, server.is_vllm = {}, [], 0, False
        server.otherwise = lambda body: say("I have no task.")
        server.url, server.folder = f"http://127.0.0.1:{server.server_port}/v1", tmp_path
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def endpoint(make_endpoint):
    return make_endpoint()


@pytest.fixture
def evaluate(stage, endpoint, tmp_path, capsys):
    """evaluate(*tasks, **settings) -> (episodes by query_id and run, summary), in this process."""

    m = stage("04_eval")

    def run(*tasks, output_dir=tmp_path / "out", **settings):
        path = write_tasks(tmp_path, *tasks)
        settings = {"model": "scripted", "base_url": endpoint.url, "concurrency": 4, "patience": 0} | settings
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            m.main(m.Settings(tasks=[str(path)], output_dir=str(output_dir), **settings))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        rows = [json.loads(line) for line in Path(output_dir, "episodes.jsonl").read_text().splitlines()]
        return {(row["query_id"], row["run"]): row for row in rows}, json.loads(
            Path(output_dir, "summary.json").read_text()
        )

    return run
