"""Subtask 2: the store of kv/store.py; --test-recovery crashes one in the middle of a write."""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

from kv.store import Client, Conflict, Store, serve

HERE = Path(__file__).resolve().parent


def crash(folder):
    """In a process of its own: commits, a snapshot, commits, half a line, and the end."""
    store = Store(folder)
    for number in range(6):
        transaction = store.begin_tx()
        transaction.put("balance", 100 * number)
        transaction.put(f"key{number}", number)
        transaction.commit()
        if number == 2:
            store.snapshot()
    with store.wal.open("a") as file:
        file.write('{"number": 7, "writes": {"balance": [500, -1')
        file.flush()
    os._exit(9)


def add_one(path, times):
    client = Client(path)
    done = 0
    while done < times:
        client.begin_tx()
        client.put("sum", client.get("sum") + 1)
        try:
            client.commit()
            done += 1
        except Conflict:
            pass


def test_recovery(folder):
    shutil.rmtree(folder, ignore_errors=True)
    process = multiprocessing.Process(target=crash, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 9
    store = Store(folder)
    wanted = {"balance": 500} | {f"key{number}": number for number in range(6)}
    assert store.data == wanted, store.data
    aborted = store.begin_tx()
    aborted.put("balance", -1)
    aborted.abort()
    aborted.commit()
    assert store.data == wanted
    opened = store.begin_tx()
    opened.put("sum", 0)
    opened.commit()
    server = serve(store, folder / "socket")
    clients = [multiprocessing.Process(target=add_one, args=(folder / "socket", 25)) for _ in range(3)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    server.shutdown()
    assert store.data["sum"] == 75, store.data
    store.snapshot()
    opened = store.begin_tx()
    opened.put("sum", -1)
    opened.commit()
    assert Store(folder).data == store.data
    assert store.rollback() == 1 and store.data["sum"] == 75
    print(json.dumps(store.data, sort_keys=True))
    print(f"wal and snapshot: {sorted(path.name for path in folder.iterdir())}\nRECOVERY SUCCESS")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test-recovery", action="store_true")
    if not parser.parse_args().test_recovery:
        sys.exit("Use it as a module (kv.store), or with --test-recovery")
    test_recovery(HERE / "kv/test")
