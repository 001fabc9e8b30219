"""Between tau2's harness and the two endpoints: waits for one that is away, and mends what the harness would
call an infrastructure error although the model did it.
"""

import hashlib
import json
import os
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

EMPTY = "(no answer)"
AWAY = (408, 409, 425, 429)  # and 500 and above: worth another try
LONGEST_ANSWER = 3600  # seconds
MESSAGE = {"role": "assistant", "content": EMPTY}
FULL = {  # in the place of a refusal because the context is full
    "id": "relay",
    "object": "chat.completion",
    "created": 0,
    "model": "agent",
    "choices": [{"index": 0, "finish_reason": "length", "message": MESSAGE}],
    "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
}


class Relay(ThreadingHTTPServer):
    """Passes /agent/v1 and /user/v1 on to the two models, waits for an endpoint that is away, mends what the
    harness would call an infrastructure error although the model did it. `dead`: why waiting was in vain."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, options):
        super().__init__(("127.0.0.1", 0), Handler)
        user_url = options.user_base_url or options.base_url
        self.routes = {  # (endpoint, key, what its requests get)
            "/agent": (options.base_url, "OPENAI_API_KEY", {"model": options.model} | options.request),
            "/user": (user_url, "USER_API_KEY", {"model": options.user_model}),
        }
        for path, (url, key, changes) in self.routes.items():
            self.routes[path] = (f"{url.rstrip('/')}/chat/completions", os.environ.get(key), changes)
        self.patience = options.patience
        self.client = httpx.Client(timeout=httpx.Timeout(LONGEST_ANSWER, connect=30))
        self.log = (options.output_dir / "requests.jsonl").open("a", buffering=1)
        self.mended = {"empty": set(), "bad_arguments": set(), "context_full": set(), "length": set()}
        self.dead = None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that was ended is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def ask(self, path, body):
        """(status, text) of the endpoint, after as many tries as the patience allows."""
        url, token, changes = self.routes[path]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        deadline = time.monotonic() + self.patience
        pause = 1
        while True:
            try:
                reply = self.client.post(url, json=body | changes, headers=headers)
                status, text = reply.status_code, reply.text
            except httpx.ReadTimeout:  # it may still be answering: not asked twice
                return 504, f"no answer within {LONGEST_ANSWER} s"
            except httpx.HTTPError as error:
                status, text = 502, f"{type(error).__name__} {error}"
            may_return = status in AWAY or status >= 500
            if not may_return or time.monotonic() + pause > deadline:
                return status, text
            time.sleep(pause)
            pause = min(2 * pause, 60)

    def mend(self, path, body, status, text):
        """(status, text) for the harness. Counts by request, so that one asked again counts once."""
        digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        if status == 400 and "context length" in text and path == "/agent":
            self.mended["context_full"].add(digest)
            return 200, json.dumps(FULL)
        if status != 200:
            self.dead = f"{self.routes[path][0]}: HTTP {status}: {' '.join(text[:300].split())}"
            return status, text
        reply = json.loads(text)
        for choice in reply["choices"]:
            if choice.get("finish_reason") == "length":
                self.mended["length"].add(digest)
            for kind in mend_message(choice["message"]):
                self.mended[kind].add(digest)
        return 200, json.dumps(reply)


def mend_message(message):
    """Names of what was mended in it."""
    calls = message.get("tool_calls") or []
    if not calls and not (message.get("content") or "").strip():
        message["content"] = EMPTY
        yield "empty"
    for call in calls:
        if not is_object(call["function"]["arguments"]):
            call["function"]["arguments"] = "{}"
            yield "bad_arguments"


def is_object(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        path = self.path.partition("/v1/")[0]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, text = self.server.ask(path, body)
        self.server.log.write(json.dumps({"path": path, "status": status, "seconds": time.time()}) + "\n")
        status, text = self.server.mend(path, body, status, text)
        data = text.encode()
        with suppress(ConnectionError):  # the harness was ended
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
