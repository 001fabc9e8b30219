"""Speed of what is ours: formatting, tokenising, the agent loop, the sandbox, --help. Prints a table; asserts nothing.

    python tests/bench.py

Pins itself to one core. The model is an endpoint that answers at once, so a step's time is the loop, HTTP and the tool.
"""

import asyncio
import importlib
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOKENS, SESSIONS, STEPS = 42_000, 78, 200  # mean length and number of the paper's trajectories


def write_sessions(folder):
    """78 logs (OpenAI request/response dumps) of about 42k tokens: code-like lines, 60 tool calls each."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]
    tools = [{"type": "function", "function": {"name": "read_file", "description": "Read a file.", "parameters": {
        "type": "object", "properties": {"absolute_path": {"type": "string"}}, "required": ["absolute_path"]}}}]  # fmt: skip
    for session in range(SESSIONS):
        messages = [{"role": "system", "content": "You are an agent."}, {"role": "user", "content": f"Task {session}"}]
        for step in range(60):
            call = {"id": f"c{step}", "type": "function", "function": {
                "name": "read_file", "arguments": json.dumps({"absolute_path": f"/workspace/{rng.choice(words)}.py"})}}  # fmt: skip
            reasoning = " ".join(rng.choices(words, k=60))
            messages.append({"role": "assistant", "content": "", "reasoning_content": reasoning, "tool_calls": [call]})
            output = "\n".join(" ".join(rng.choices(words, k=9)) + " = 1" for _ in range(48))
            messages.append({"role": "tool", "tool_call_id": f"c{step}", "content": output})
        response = {"choices": [{"message": {"role": "assistant", "content": "Done."}, "finish_reason": "stop"}]}
        log = {"request": {"model": "m", "messages": messages, "tools": tools}, "response": response}
        Path(folder, f"session{session:02d}.json").write_text(json.dumps(log))
    return words


class Endpoint(BaseHTTPRequestHandler):
    """Asks STEPS times for the same file, then answers; HTTP/1.1, so that connections are kept as vLLM keeps them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": "Done."}
        if sum(m["role"] == "assistant" for m in body["messages"]) < STEPS:
            function = {"name": "read_file", "arguments": '{"absolute_path": "/workspace/a.txt"}'}
            message |= {"tool_calls": [{"id": "c", "type": "function", "function": function}]}
        reply = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def main():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    (folder / "logs").mkdir()
    words = write_sessions(folder / "logs")

    started = time.perf_counter()
    command = [sys.executable, ROOT / "02_format_trajectories.py", folder / "logs", "--output_file", folder / "train.jsonl"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, memory = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    rows.append(("02: 78 logs to rows", f"{seconds:.1f} s, {memory:.2f} GB"))

    spec = importlib.util.spec_from_file_location("make_model", ROOT / "recipes/demo/make_model.py")
    make_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_model)
    sft = importlib.import_module("03_sft")
    tok = make_model.make_tokenizer([" ".join(words)] * 3, vocab_size=16_000)
    tok.stop_ids, tok.end_id = set(tok.convert_tokens_to_ids(make_model.STOPS)), tok.convert_tokens_to_ids("<|user|>")
    started = time.perf_counter()
    samples = sft.tokenize(tok, sft.read_rows(folder / "train.jsonl"), 125_000)[0]
    seconds, memory = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    mean = sum(len(sample["input_ids"]) for sample in samples) / len(samples)
    rows.append((f"03: encode {len(samples)} rows, mean {mean:,.0f} tokens", f"{seconds:.1f} s, {memory:.2f} GB"))

    ev = importlib.import_module("04_eval")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    task = {"query_id": "bench", "turns": [{"query": "q", "check": "true"}]}
    (folder / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    started = time.perf_counter()
    command = [sys.executable, ROOT / "04_eval.py", "--base_url", f"http://127.0.0.1:{server.server_port}/v1", "--model", "m"]
    command += ["--tasks", folder / "tasks.jsonl", "--output_dir", folder / "run", "--max_steps", str(STEPS + 1)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    episode = json.loads((folder / "run/episodes.jsonl").read_text())
    each = 1000 * episode["meta"]["seconds"] / episode["meta"]["steps"]
    rows.append((f"04: one step of {STEPS}, endpoint and tool included", f"{each:.1f} ms"))

    async def sandbox_times():
        settings = ev.Settings(model="m", output_dir=str(folder / "run"))
        cold, warm = [], []
        for n in range(10):
            sandbox = ev.Sandbox(folder / "run/sandbox", n, settings)
            sandbox.fill(None)
            for times in (cold, warm):
                started = time.perf_counter()
                await sandbox.call("run_shell_command", {"command": "true"}, 10)
                times.append(1000 * (time.perf_counter() - started))
            await sandbox.stop()
        return sorted(cold)[5], sorted(warm)[5]

    cold, warm = asyncio.run(sandbox_times())
    rows.append(("04: `true` in a new sandbox / in a running one, median of 10", f"{cold:.0f} ms / {warm:.1f} ms"))
    for script in ("01_build_queries.py", "02_format_trajectories.py", "04_eval.py"):
        started = time.perf_counter()
        subprocess.run([sys.executable, ROOT / script, "--help"], check=True, stdout=subprocess.DEVNULL)
        rows.append((f"{script} --help", f"{time.perf_counter() - started:.2f} s"))
    for name, value in rows:
        print(f"{name:62} {value}")


if __name__ == "__main__":
    main()
