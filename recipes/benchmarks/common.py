"""What the converters here share: options, pinned data, the task file; and the side of their checks.

A converter is its own check: write() copies it (as check.py) and this file, which starts it, into the private
folder.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(sys.argv[0]).name
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
LONGEST = 1 << 20  # bytes of an answer
MEMORY = 6 << 30  # bytes of the code under test; the sandbox has 8 for everything
POOLS = ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "NUMEXPR_NUM", "TF_NUM_INTRAOP", "TF_NUM_INTEROP")


def fail(text):
    """A user's mistake: one line, exit 2."""
    sys.exit(print(text, file=sys.stderr) or 2)


def options(description, *data, venv=True):
    """Paths `data`, --output, --no_tools and, for a check with packages, --venv; fails without them.
    Of the result, `check` starts the check, `place` is "answer" or "file".
    """
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=shape)
    for name in data:
        parser.add_argument(name, type=Path)
    if venv:
        parser.add_argument("--venv", type=Path, required=True, help="environment of the check, see above")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--no_tools", action="store_true", help="write no_tools.jsonl, for --no_tools of 04")
    found = parser.parse_args()
    for name in (*data, "venv") if venv else data:
        path = getattr(found, name)
        if not path.exists():
            fail(f"{path}: no such file or folder ({name}: see {HERE} --help)")
    found.place = "answer" if found.no_tools else "file"
    found.check = f"{'/opt/venv/bin/python' if venv else 'python3'} -I /private/common.py"
    return found


def pinned(path, known):
    """known[sha256 of the file]: a cut download, or a page in its place, never becomes a score of 0."""
    if not path.is_file():
        fail(f"{path}: no such file (see {HERE} --help)")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in known:
        expected = " or ".join(known)
        fail(f"{path}: sha256 {digest}, expected {expected}: get it again (see {HERE} --help)")
    return known[digest]


def unchanged(clone, commit, *paths):
    """The files under `paths` in the clone are those of the commit."""
    command = ["git", "-C", clone, "diff", "--quiet", commit, "--", *paths]
    if not shutil.which("git") or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        names = " and ".join(paths)
        fail(f"{clone}: {names} are not as in its commit: git clone it, then git checkout {commit}")


def installed(venv, *packages):
    """The check's environment has these versions, as in `pip install name==1.0`."""
    for package in packages:
        name, version = package.replace("-", "_").split("==")
        if not list(venv.glob(f"lib/python3*/site-packages/{name}-{version}*.dist-info")):
            fail(f"{venv}: {package} is not installed there (see {HERE} --help)")


def write(found, tasks, count, private):
    """OUTPUT/tasks.jsonl (or no_tools.jsonl) and OUTPUT/private. private: {file to copy: its name there}."""
    assert len(tasks) == count, f"{len(tasks)} tasks, not {count}"
    shared = {"private": "private"}
    if "venv" in found:
        shared["venv"] = str(found.venv.absolute())
    path = found.output / ("no_tools.jsonl" if found.no_tools else "tasks.jsonl")
    try:
        for source, name in ({__file__: "common.py", sys.argv[0]: "check.py"} | private).items():
            place = found.output / "private" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
        path.write_text("".join(json.dumps(task | shared) + "\n" for task in tasks))
    except OSError as error:
        fail(f"--output: {error}")
    print(f"{path}: {count} tasks with {sum(len(task['turns']) for task in tasks)} turns")


# ---- In the sandbox ----


def run(*words):
    """check(words of the command), or solve(...) where "solve" ends them.

    A fault of ours is `Bail out!` (not run), never a 0; one thread a pool, however many cores there are.
    """
    sys.excepthook = lambda kind, error, trace: print(f"Bail out! {kind.__name__}: {error}")
    os.environ |= {f"{pool}_THREADS": "1" for pool in POOLS}
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import check

    sys.exit(check.solve(*words[:-1]) if words[-1:] == ("solve",) else check.check(*words))


def submitted(place, file, answer="/answer.md"):
    """The text to grade, "" if there is none: a link, which could lead into /private, is none, nor is what
    would use up the check's memory."""
    path = Path(answer if place == "answer" else file)
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LONGEST:
        return ""
    return path.read_text(errors="replace")


def hand_in(place, file, code):
    """What a right answer is: printed, or in the file."""
    if place == "answer":
        print(f"```python\n{code}\n```")
    else:
        Path(file).write_text(code)


def verdict(grade, code, reference=None):
    """The check's exit status. grade(code) -> (passed, text).

    Where the benchmark's own solution, `reference`, fails as well, nothing was measured: `Bail out!`.
    """
    passed, text = grade(code)
    if not passed and reference:
        sound, fault = grade(reference)
        if not sound:
            raise RuntimeError(f"the benchmark's own solution fails here as well: {fault}")
    print(f"{'ok' if passed else 'not ok'} - {text}")
    return 0 if passed else 1


def confine():
    """In each process forked from here: the code under test cannot print in our place, nor open the tests."""
    os.register_at_fork(after_in_child=_confine)


def spare():
    """What asks for too much memory fails by itself, before the sandbox ends the whole check."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def _confine():
    spare()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(_refuse)


def _refuse(event, arguments):
    if event in STARTS:
        raise PermissionError(f"{event} is not for the code under test")
    path = arguments[0] if event == "open" else 0
    if not isinstance(path, int) and os.path.realpath(os.fsdecode(path)).startswith("/private"):
        raise PermissionError(f"{path} is not for the code under test")


if __name__ == "__main__":
    run(*sys.argv[1:])
