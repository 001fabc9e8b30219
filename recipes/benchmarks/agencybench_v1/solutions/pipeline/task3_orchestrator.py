"""Subtask 3: the orchestrator. Calls are lines of JSON on a TCP socket; the store has every state.

SUBMIT {tasks}, GET_TASK {worker}, REPORT_RESULT {task_id, result}, STATUS {}, STOP {}. A task waits for those
that it names in "after"; one that is lost with its worker is queued again, three times in all. Killed and
started again, the orchestrator goes on with what the store says.
"""

import argparse
import json
import logging
import socket
import socketserver
import threading
import time
from collections import Counter
from pathlib import Path

from kv.store import Store, serve

HERE = Path(__file__).resolve().parent
TRIES = 3


class Orchestrator:
    def __init__(self, folder, limit=8):
        self.store = Store(folder)
        self.limit = limit  # tasks that run at a time
        self.lock = threading.RLock()
        self.turns = Counter()  # tasks given to a worker: the idlest is next
        serve(self.store, Path(folder) / "socket")
        for name, task in self.tasks().items():
            if task["state"] == "running":
                self.save(name, task | {"state": "queued"})

    def tasks(self):
        found = {key: value for key, value in list(self.store.data.items()) if key.startswith("task/")}
        return {key.removeprefix("task/"): value for key, value in found.items()}

    def save(self, name, task, facts=None):
        transaction = self.store.begin_tx()
        transaction.put(f"task/{name}", task)
        if facts is not None:
            transaction.put("facts", facts)
        transaction.commit()
        logging.info("task %s: %s", name, task["state"])

    def submit(self, tasks):
        with self.lock:
            for name, task in tasks.items():
                if name not in self.tasks():
                    self.save(name, {"after": [], "tries": 0} | task | {"state": "queued"})

    def get_task(self, worker):
        with self.lock:
            tasks = self.tasks()
            states = {name: task["state"] for name, task in tasks.items()}
            if list(states.values()).count("running") >= self.limit:
                return None
            for name, task in tasks.items():
                ready = all(states.get(before) == "done" for before in task["after"])
                if task["state"] == "queued" and ready:
                    self.turns[worker] += 1
                    task |= {"state": "running", "worker": worker, "tries": task["tries"] + 1}
                    self.save(name, task | {"since": time.time()})
                    return {"task_id": name, **task}
        return None

    def report_result(self, name, result):
        with self.lock:
            task = self.tasks()[name]
            facts = None
            if "error" not in result and "operator" in task:
                operator = task["operator"]
                facts = set(self.store.data.get("facts", [])) - set(operator.get("del", []))
                facts = sorted(facts | set(operator["add"]))
            state = "failed" if "error" in result else "done"
            self.save(name, task | {"state": state, "result": result}, facts)

    def lost(self, worker):
        """A worker's connection ended: what it had is given to another, or has failed."""
        with self.lock:
            for name, task in self.tasks().items():
                if task["state"] == "running" and task["worker"] == worker:
                    state = "queued" if task["tries"] < TRIES else "failed"
                    self.save(name, task | {"state": state, "result": {"error": "its worker crashed"}})


def listen(orchestrator, port):
    """The server; its address is what it listens on."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            worker = None
            try:
                for line in self.rfile:
                    call = json.loads(line)
                    worker = call.get("worker", worker)
                    self.wfile.write((json.dumps(self.answer(call)) + "\n").encode())
            except ConnectionError:
                pass
            finally:
                if worker:
                    orchestrator.lost(worker)

        def answer(self, call):
            if call["call"] == "SUBMIT":
                orchestrator.submit(call["tasks"])
            elif call["call"] == "GET_TASK":
                return {"task": orchestrator.get_task(call["worker"])}
            elif call["call"] == "REPORT_RESULT":
                orchestrator.report_result(call["task_id"], call["result"])
            elif call["call"] == "STOP":
                threading.Thread(target=self.server.shutdown).start()
            else:
                return {"tasks": orchestrator.tasks(), "facts": orchestrator.store.data.get("facts", [])}
            return {}

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    return Server(("127.0.0.1", port), Handler)


class Caller:
    """A connection to the orchestrator; waits up to 10 s until it is there."""

    def __init__(self, port):
        deadline = time.monotonic() + 10
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.file = self.socket.makefile("rw")

    def __call__(self, name, **arguments):
        self.file.write(json.dumps({"call": name, **arguments}) + "\n")
        self.file.flush()
        return json.loads(self.file.readline())


def events_as_tasks():
    lines = (HERE / "data/events.jsonl").read_text().splitlines()
    events = map(json.loads, lines)
    return {event["id"]: {"event": event} for event in events}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=7310)
    parser.add_argument("--folder", type=Path, default=HERE / "kv/state")
    parser.add_argument("--no-events", action="store_true", help="wait for SUBMIT alone")
    options = parser.parse_args()
    (HERE / "logs").mkdir(exist_ok=True)
    place = HERE / "logs/orchestrator.log"
    logging.basicConfig(filename=place, level=logging.INFO, format="%(asctime)s %(message)s")
    orchestrator = Orchestrator(options.folder)
    if not options.no_events and (HERE / "data/events.jsonl").exists():
        orchestrator.submit(events_as_tasks())
    with listen(orchestrator, options.port) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
