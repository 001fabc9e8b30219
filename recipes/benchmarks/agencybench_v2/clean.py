"""Remove from the working folder what could lead or stop a grader that copies it: links that lead out of it,
now or where the copy lies, what is no file and no folder, files of holes that would fill the disk."""

import os
import stat
import sys


def is_bad(path):
    status = os.lstat(path)
    kind = status.st_mode
    if stat.S_ISREG(kind):
        return status.st_size - 512 * status.st_blocks > 1 << 30
    if not stat.S_ISLNK(kind):
        return not stat.S_ISDIR(kind)
    if "/proc" in os.readlink(path):  # in the grader's process /proc/self/cwd is another folder
        return True
    try:
        return not os.path.realpath(path, strict=True).startswith(os.getcwd() + "/")
    except OSError:  # it leads nowhere, or where only the grader may look
        return True


def sweep():
    """Remove what is bad; returns how much."""
    removed = 0
    for folder, folders, files in os.walk("."):
        for name in folders + files:
            path = os.path.join(folder, name)
            if is_bad(path):
                os.unlink(path)
                removed += 1
    return removed


os.system("chmod -R u+rwX .")
while sweep():  # a link to one that is gone now leads nowhere
    pass
sys.exit(0)
