"""Speed of what is ours: formatting, tokenising, the agent loop, the sandbox, --help. Prints a table; asserts nothing.

    python tests/bench.py                  # about two minutes
    python tests/bench.py --limi LIMI      # a clone of GAIR-NLP/LIMI: also its two data scripts on the same logs

Runs on one core. The agent loop's time is its own CPU time, beside an endpoint in another process and tools that cost
nothing; the sandbox is timed by the clock.
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9))) for _ in range(5000)]
TOOL = {"name": "run_shell_command", "description": "Run a command.", "parameters": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}  # fmt: skip


def prose(n):
    return " ".join(RNG.choices(WORDS, k=n))


def trajectory(tokens):
    """Messages of about `tokens` tokens (4.7 characters each): steps of one call and its result, then an answer."""
    messages, size = [{"role": "system", "content": prose(300)}, {"role": "user", "content": prose(80)}], 2200
    while size < 4.7 * tokens:
        call = {"type": "function", "function": {"name": TOOL["name"], "arguments": {"command": prose(20)}}}
        call["id"] = f"c{len(messages)}"
        output = "\n".join(prose(8) for _ in range(20))
        messages += [{"role": "assistant", "content": prose(20), "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": call["id"], "content": output}]  # fmt: skip
        size += len(output) + 320
    return [*messages, {"role": "assistant", "content": prose(40)}]


def sii_log(name, messages):
    """The same as a log of SII CLI: its last two requests, and the next-speaker check that holds the answer."""
    contents = []
    for message in messages[1:]:
        if message["role"] == "tool":
            response = {
                "name": TOOL["name"],
                "id": message["tool_call_id"],
                "response": {"output": message["content"]},
            }
            contents.append({"role": "user", "parts": [{"functionResponse": response}]})
            continue
        parts = [{"text": message["content"]}]
        for call in message.get("tool_calls", []):
            parts.append({"functionCall": {"name": TOOL["name"], "args": call["function"]["arguments"]}})
        contents.append({"role": "user" if message["role"] == "user" else "model", "parts": parts})
    question = "Analyze *only* the content and structure of your immediately preceding response"
    check = [*contents, {"role": "user", "parts": [{"text": question}]}]
    events = []
    for part, tools in ((contents[:-3], [TOOL]), (contents[:-1], [TOOL]), (check, [])):
        request = {"system_instruction": messages[0]["content"], "messages": part}
        request["tools"] = [{"functionDeclarations": tools}] if tools else []
        events.append({"type": "api_request_full", "data": {"full_request": request}})
    return {"id": name, "model": "m", "events": events}


def timed(*command):
    """(seconds, peak GB) of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def bench_data(folder, limi):
    make_model = load("recipes/demo/make_model.py")
    (folder / "logs").mkdir()
    for number in range(78):
        log = sii_log(f"session{number:02d}", trajectory(42_000))
        (folder / f"logs/session{number:02d}.json").write_text(json.dumps(log))
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(10_000):
            row = {
                "query_id": str(number),
                "messages": trajectory(4_000),
                "tools": [{"type": "function", "function": TOOL}],
            }
            file.write(json.dumps(row) + "\n")
    tok = make_model.make_tokenizer([prose(100_000)], vocab_size=16_000)
    tok.save_pretrained(folder / "tokenizer")

    seconds, memory = timed(
        ROOT / "02_format_trajectories.py", folder / "rows.jsonl", "--output_file", folder / "b.jsonl"
    )
    yield "02: 10,000 rows of 4k tokens", f"{seconds:.1f} s, {memory:.2f} GB"
    two = [ROOT / "02_format_trajectories.py", folder / "logs", "--output_file", folder / "train.jsonl"]
    seconds, memory = timed(*two, "--tokenizer", folder / "tokenizer")
    yield "02: 78 logs of 42k tokens, tokens counted", f"{seconds:.1f} s, {memory:.2f} GB"
    if limi:
        scripts, told = Path(limi, "scripts/data_prepare"), seconds
        seconds, _ = timed(
            scripts / "events2messages.py", "--raw_dir", folder / "logs", "--output_dir", folder / "limi"
        )
        again = [scripts / "messages_json2parquet_128k.py", "--tokenizer_path", folder / "tokenizer"]
        again += ["--input_json", folder / "limi/openai_training_data.json", "--output_parquet", folder / "t.parquet"]
        again, _ = timed(*again, "--max_tokens", 125_000, "--duplicate_times", 2)
        seconds += again
        yield "LIMI's two scripts on the same logs, and 02's time as a share", f"{seconds:.1f} s, {told / seconds:.2f}"

    sft = importlib.import_module("03_sft")
    tok.stop_ids, tok.end_id = set(tok.convert_tokens_to_ids(make_model.STOPS)), tok.convert_tokens_to_ids("<|user|>")
    started = time.perf_counter()
    samples = sft.tokenize(tok, sft.read_rows(folder / "train.jsonl"), 125_000)[0]
    mean = sum(len(sample["input_ids"]) for sample in samples) / len(samples)
    seconds, memory = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    yield f"03: ids and labels of {len(samples)} rows, mean {mean:,.0f} tokens", f"{seconds:.1f} s, {memory:.2f} GB"


# Answers at once: a call in every step but the last
ENDPOINT = r"""
import asyncio, json
STEPS, TEXT = 30, "x" * 500
def reply(body):
    done = sum(message["role"] == "assistant" for message in body["messages"])
    function = {"name": "read_file", "arguments": json.dumps({"absolute_path": "/workspace/a"})}
    calls = [{"id": f"c{done}", "type": "function", "function": function}] if done < STEPS - 1 else []
    message = {"role": "assistant", "content": TEXT, "tool_calls": calls}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}).encode()
async def serve(reader, writer):
    while head := await reader.readuntil(b"\r\n\r\n"):
        sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        size = int(sizes[0].split(b":")[1])
        data = reply(json.loads(await reader.readexactly(size)))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def bench_loop(folder, episodes=64):
    stage = importlib.import_module("04_eval")

    async def loop_time(url):
        settings = stage.Settings(model="x", base_url=url, concurrency=episodes, output_dir=str(folder))
        task = {"query_id": "t", "turns": [{"query": "q", "check": "true"}]}

        async def call(self, name, arguments, timeout):
            return {"output": "0\n" if name == "check" else "x" * 500}

        real, stage.Sandbox.call = stage.Sandbox.call, call
        try:
            with open(folder / "episodes.jsonl", "w") as file:
                started = time.process_time()
                done = await stage.evaluate(settings, url, [(task, run) for run in range(episodes)], file)
        finally:
            stage.Sandbox.call = real
        return 1000 * (time.process_time() - started) / sum(episode["meta"]["steps"] for episode in done)

    async def sandbox_times():
        requests = [("write_file", {"file_path": "/workspace/a", "content": "x" * 500})]
        requests += [("run_shell_command", {"command": "true"}), ("read_file", {"absolute_path": "/workspace/a"})] * 10
        times = {"start": [], "run_shell_command": [], "read_file": []}
        for _ in range(10):
            sandbox = stage.Sandbox(folder / "sandbox", 0, stage.Settings())
            sandbox.fill(None)
            for n, (name, arguments) in enumerate(requests):
                started = time.perf_counter()
                assert "output" in await sandbox.call(name, arguments, 10)
                times[name if n else "start"].append(1000 * (time.perf_counter() - started))
            await sandbox.stop()
        return [statistics.median(values) for values in times.values()]

    server = subprocess.Popen(
        [sys.executable, "-c", ENDPOINT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            loop = asyncio.run(loop_time(url))
    finally:
        server.kill()
        server.wait()
    start, command, read = asyncio.run(sandbox_times())
    yield f"04: own CPU time of a step, {episodes} episodes at once", f"{loop:.2f} ms"
    yield "04: sandbox start / `true` in it / read_file in it, medians", f"{start:.0f} / {command:.1f} / {read:.2f} ms"
    for script in ("01_build_queries.py", "02_format_trajectories.py", "04_eval.py"):
        yield f"{script} --help", f"{timed(ROOT / script, '--help')[0]:.2f} s"


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limi", help="a clone of github.com/GAIR-NLP/LIMI")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="bench") as temporary:
        os.chmod(temporary, 0o755)  # the sandbox's user must get in
        for rows in (bench_data(Path(temporary), arguments.limi), bench_loop(Path(temporary))):
            for name, value in rows:
                print(f"{name:64} {value}", flush=True)
