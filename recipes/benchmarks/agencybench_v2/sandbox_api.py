"""Stands in for the container that the graders of Game and Frontend ask through the package agent_sandbox: a
shell, files, and a headless chromium at a port, here in the grader's own sandbox, at 127.0.0.1:8088.

The page that a browser shows is the model's: what comes from a page (it has an origin, no script can hide it)
gets no answer, else the page could run commands here.
"""

import email
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOME = "/tmp/container"
DEBUGGING = 9222  # chromium's port
SIZE = {"width": 1280, "height": 800}
CHROMIUM = ["/usr/lib/chromium/chromium", "/usr/bin/chromium", "/usr/bin/google-chrome"]
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--user-data-dir=/tmp/chromium"]
FLAGS += [f"--remote-debugging-port={DEBUGGING}", "--window-size=1280,800", "about:blank"]
# What `python -m http.server` imports is never a file of the folder that it serves
ENVIRONMENT = os.environ | {"PYTHONSAFEPATH": "1"}
SESSIONS = {}


def context():
    system = {"os": "linux", "os_version": "", "arch": "x86_64", "user": "agent", "home_dir": HOME}
    system |= {"timezone": "UTC", "occupied_ports": []}
    detail = {"system": system, "runtime": {"python": [], "nodejs": []}, "utils": []}
    return {"home_dir": HOME, "version": "stand-in", "detail": detail}


def browser():
    address = f"http://127.0.0.1:{DEBUGGING}"
    return {"data": {"user_agent": "chromium", "cdp_url": address, "vnc_url": "", "viewport": SIZE}}


def execute(command, async_mode):
    """The data of v1/shell/exec."""
    name = str(len(SESSIONS))
    data = {"session_id": name, "command": command}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    if async_mode:
        streams["stdout"] = subprocess.DEVNULL
    words = ["bash", "-c", command]
    process = subprocess.Popen(words, cwd=HOME, env=ENVIRONMENT, text=True, start_new_session=True, **streams)
    SESSIONS[name] = process
    if async_mode:
        return data | {"status": "running"}
    output, _ = process.communicate(timeout=60)
    return data | {"status": "completed", "output": output, "exit_code": process.returncode}


def kill(name):
    os.killpg(SESSIONS[name].pid, 9)
    SESSIONS[name].wait()


def upload(headers, content):
    """Write the file of a multipart form; it has the fields path and file."""
    form = email.message_from_bytes(f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + content)
    fields = {}
    for part in form.get_payload():
        name = part.get_param("name", header="content-disposition")
        fields[name] = part.get_payload(decode=True)
    path = fields["path"].decode()
    with open(path, "wb") as file:
        file.write(fields["file"])
    return {"file_path": path, "file_size": len(fields["file"]), "success": True}


class Api(BaseHTTPRequestHandler):
    def answer(self):
        length = int(self.headers.get("content-length") or 0)
        content = self.rfile.read(length)
        if self.headers.get("origin") or self.headers.get("sec-fetch-site"):
            return self.send_error(403)
        if self.path == "/v1/sandbox":
            reply = context()
        elif self.path == "/v1/browser/info":
            reply = browser()
        elif self.path == "/v1/file/upload":
            reply = {"data": upload(self.headers, content)}
        elif self.path == "/v1/shell/kill":
            kill(json.loads(content)["id"])
            reply = {"data": {"status": "terminated", "returncode": -9}}
        elif self.path == "/v1/shell/exec":
            request = json.loads(content)
            reply = {"data": execute(request["command"], request.get("async_mode"))}
        else:
            return self.send_error(404)
        text = json.dumps({"success": True, "message": "", **reply}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = answer
    do_POST = answer

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    os.makedirs(HOME, exist_ok=True)
    program = [path for path in CHROMIUM if os.path.exists(path)]
    if not program:
        sys.exit("no chromium")
    server = ThreadingHTTPServer(("127.0.0.1", 8088), Api)
    with open(os.devnull, "w") as null:
        subprocess.Popen([program[0], *FLAGS], stdout=null, stderr=null, env=ENVIRONMENT)
    server.serve_forever()
