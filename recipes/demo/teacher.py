"""A teacher for the demo: an OpenAI-compatible endpoint on localhost that plays the solutions of tasks.py.

    python recipes/demo/teacher.py data/demo/queries.jsonl --port 8901    # prints its base_url and serves

It knows a task by the user's first message and answers with the task's next step as a tool call, then with
its answer. What the calls print is real: 04_eval.py runs them. It stands for the paper's strong model.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOOL = "bash"
MODEL = "scripted-teacher"


def reply(tasks, messages):
    """The assistant's next message. tasks: {first user message: "meta" of the task}"""
    users = [message["content"] for message in messages if message["role"] == "user"]
    done = sum(message["role"] == "assistant" for message in messages)
    known = tasks.get(users[0])
    if known is None:
        return {"role": "assistant", "content": "I know the demo's tasks only."}
    if done >= len(known["steps"]):
        return {"role": "assistant", "content": known["answer"]}
    said, command = known["steps"][done]
    function = {"name": TOOL, "arguments": json.dumps({"command": command})}
    call = {"id": f"call_{done}", "type": "function", "function": function}
    return {"role": "assistant", "content": said, "tool_calls": [call]}


class Handler(BaseHTTPRequestHandler):
    tasks = {}

    def do_GET(self):
        self.send({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "demo"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = reply(self.tasks, request["messages"])
        finish = "tool_calls" if "tool_calls" in message else "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        self.send({"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage})

    def send(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing: 04 tells what happens."""


def main(tasks, port):
    for line in Path(tasks).read_text().splitlines():
        task = json.loads(line)
        Handler.tasks[task["turns"][0]["query"]] = task["meta"]
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("tasks")
    parser.add_argument("--port", type=int, default=8901)
    main(**vars(parser.parse_args()))
