"""A port of the sandbox, which has no network, to a socket of ours.

python3 -I relay.py PORT SOCKET
"""

import socket
import sys
import threading


def pump(source, target):
    """Pass on what comes until it ends."""
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # the other side is gone
        source.close()


def main(port, path):
    server = socket.create_server(("127.0.0.1", int(port)))
    while True:
        client, _ = server.accept()
        link = socket.socket(socket.AF_UNIX)
        link.connect(path)
        threading.Thread(target=pump, args=(client, link), daemon=True).start()
        threading.Thread(target=pump, args=(link, client), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
