"""The check of a download: does workspace/data hold a file of this hash and size?

    python3 -I dataset.py SHA256 SIZE [--pointer]    # --pointer: a git-lfs pointer to it will do
"""

import hashlib
import os
import sys
from pathlib import Path


def is_it(path, sha256, size, pointer):
    """Is this file the one, or a pointer to it?"""
    if path.is_symlink() or not path.is_file():
        return False
    if path.stat().st_size == size:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    if not pointer or path.stat().st_size > 1024:
        return False
    lines = path.read_bytes().splitlines()
    return f"oid sha256:{sha256}".encode() in lines and f"size {size}".encode() in lines


sha256, size, *pointer = sys.argv[1:]
files = []
for folder, _, names in os.walk("workspace/data"):
    files += [Path(folder, name) for name in names]
found = any(is_it(path, sha256, int(size), bool(pointer)) for path in files)
print(f"{'ok' if found else 'not ok'} - the dataset's file of {size} bytes is below workspace/data")
sys.exit(not found)
