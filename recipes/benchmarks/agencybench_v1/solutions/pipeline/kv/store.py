"""A key-value store with transactions, a write-ahead log and snapshots; many share it by a socket.

A transaction is a line of the log, {"number", "writes": {key: [before, after]}, "sum"}: it counts once the
whole line, with its right sum, is on the disk. Readers are optimistic: a transaction that read what another
one has changed since is refused (Conflict).
"""

import json
import os
import socket
import socketserver
import threading
import zlib
from pathlib import Path

EVERY = 200  # transactions between two snapshots


class Conflict(Exception):
    """Another transaction changed what this one has read."""


def write_whole(path, text):
    """The file is either the old or the new one, whatever happens in between."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def checksum(record):
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def seal(record):
    return json.dumps(record | {"sum": checksum(record)}) + "\n"


def unseal(line):
    """The record of a line; None where the line is cut or damaged."""
    try:
        record = json.loads(line)
        given = record.pop("sum")
    except (ValueError, KeyError, AttributeError):
        return None
    return record if given == checksum(record) else None


class Store:
    """One process owns it (`owner` names the process); the others come by serve() and Client."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.own()
        self.recover()

    def own(self):
        """By a rename, which is atomic; what a dead process left is taken over."""
        owner = self.folder / "owner"
        try:
            alive = int(owner.read_text())
            os.kill(alive, 0)
            if alive != os.getpid():
                raise RuntimeError(f"{self.folder} belongs to process {alive}")
        except (FileNotFoundError, ProcessLookupError, ValueError):
            pass
        write_whole(owner, str(os.getpid()))

    def close(self):
        (self.folder / "owner").unlink()

    def recover(self):
        """The snapshot, and then the log as far as it is whole; what follows is cut off."""
        self.wal = self.folder / "wal.jsonl"
        snapshot = self.folder / "snapshot.json"
        saved = json.loads(snapshot.read_text()) if snapshot.exists() else {"number": 0, "data": {}}
        self.data = saved["data"]
        self.number = self.snapshot_number = saved["number"]
        self.changed = {}  # key -> number of the transaction that wrote it last
        self.records = []
        whole = 0
        for line in self.wal.read_bytes().splitlines(keepends=True) if self.wal.exists() else []:
            record = unseal(line)
            if record is None or not line.endswith(b"\n"):
                break
            whole += len(line)
            if record["number"] > self.number:
                self.apply(record)
        with self.wal.open("ab") as file:
            file.truncate(whole)

    def apply(self, record):
        self.number = record["number"]
        self.records.append(record)
        for key, (_, after) in record["writes"].items():
            self.changed[key] = self.number
            self.set(key, after)

    def set(self, key, value):
        if value is None:
            self.data.pop(key, None)
        else:
            self.data[key] = value

    def begin_tx(self):
        return Transaction(self)

    def commit(self, reads, writes, started):
        with self.lock:
            for key in reads:
                if self.changed.get(key, 0) > started:
                    raise Conflict(key)
            changes = {key: [self.data.get(key), value] for key, value in writes.items()}
            record = {"number": self.number + 1, "writes": changes}
            with self.wal.open("a") as file:
                file.write(seal(record))
                file.flush()
                os.fsync(file.fileno())
            self.apply(record)
            if len(self.records) >= EVERY:
                self.snapshot()

    def snapshot(self):
        with self.lock:
            whole = {"number": self.number, "data": self.data}
            write_whole(self.folder / "snapshot.json", json.dumps(whole))
            write_whole(self.wal, "")
            self.snapshot_number = self.number
            self.records = []

    def rollback(self):
        """Back to the last snapshot, by the log read backwards; how many transactions were undone."""
        with self.lock:
            undone = len(self.records)
            for record in reversed(self.records):
                for key, (before, _) in record["writes"].items():
                    self.set(key, before)
            self.snapshot()
            return undone


class Transaction:
    def __init__(self, store):
        self.store = store
        self.started = store.number
        self.reads = set()
        self.writes = {}

    def get(self, key):
        if key in self.writes:
            return self.writes[key]
        self.reads.add(key)
        return self.store.data.get(key)

    def put(self, key, value):
        self.writes[key] = value

    def commit(self):
        self.store.commit(self.reads, self.writes, self.started)

    def abort(self):
        self.writes = {}


def serve(store, path):
    """Answers lines of JSON, [name, arguments ...], on a Unix socket; a connection has a transaction."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            transaction = store.begin_tx()
            for line in self.rfile:
                name, *arguments = json.loads(line)
                if name == "begin_tx":
                    transaction = store.begin_tx()
                    reply = {}
                elif name in ("get", "put", "commit", "abort"):
                    try:
                        reply = {"value": getattr(transaction, name)(*arguments)}
                    except Conflict as error:
                        reply = {"conflict": str(error)}
                else:
                    reply = {"error": f"no such call: {name}"}
                self.wfile.write((json.dumps(reply) + "\n").encode())

    Path(path).unlink(missing_ok=True)
    server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Client:
    """begin_tx(), put(), get(), commit(), abort() of a store that another process owns."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rw")

    def call(self, *words):
        self.file.write(json.dumps(words) + "\n")
        self.file.flush()
        reply = json.loads(self.file.readline())
        if "conflict" in reply:
            raise Conflict(reply["conflict"])
        return reply.get("value")

    def __getattr__(self, name):
        return lambda *arguments: self.call(name, *arguments)
