"""Make the environment of a repository: run by 01_build_queries.py, or by hand to see what it lacks.

    python recipes/languages/environment.py TREE FOLDER LANGUAGE ["SETUP COMMAND"]

Runs LANGUAGE_setup.* (or the command) in TREE, a checkout without history, with network and $ENVIRONMENT,
       which is FOLDER/venv.
Writes FOLDER/venv   what every sandbox shows at /opt/venv; paths in it are those of the sandbox
       FOLDER/made   what the set-up left in the tree: generated sources, a link to node_modules
A set-up runs other people's code on this machine, with network, as installing by hand does.
Prints all that the set-up says; its last line is "runner: NAME", one of check.py's.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def run_setup(tree, folder, language, command):
    """Exit status of the set-up."""
    argv = ["bash", "-c", command]
    if not command:
        [script] = Path(__file__).parent.glob(f"{language}_setup.*")
        argv = [sys.executable if script.suffix == ".py" else "bash", str(script.resolve())]
    return subprocess.run(
        argv, cwd=tree, env=os.environ | {"ENVIRONMENT": str(folder / "venv")}, stdin=subprocess.DEVNULL
    ).returncode


def add_python(venv):
    """04 wants a python in every environment, and check.py runs on it."""
    for name in ("python", "python3"):
        if not (venv / "bin" / name).exists():
            system = (
                "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else os.path.realpath(sys.executable)
            )
            (venv / "bin" / name).symlink_to(system)


def keep_made(tree, folder, before):
    """Move what the set-up left in the tree to made/."""
    made = folder / "made"
    made.mkdir()
    if (tree / "node_modules").exists() and tree / "node_modules" not in before:
        shutil.move(tree / "node_modules", folder / "venv" / "node_modules")
        (made / "node_modules").symlink_to("/opt/venv/node_modules")
    for path in sorted(tree.rglob("*")):
        left_over = re.search(r"\.egg-info/|/__pycache__/|/build/", f"{path}/".removeprefix(str(tree)))
        if path not in before and path.is_file() and not left_over:
            target = made / path.relative_to(tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def tell_paths(tree, venv):
    """Put the sandbox's paths in place of this machine's; the workspace itself can be imported."""
    written = [*(venv / "bin").iterdir(), venv / "pyvenv.cfg"]
    for site in venv.glob("lib/python*/site-packages"):
        (site / "workspace.pth").write_text("/workspace/src\n/workspace\n")
        (site / "sitecustomize.py").touch()  # else every Python, the check's own too, begins with the agent's
        written += [
            *site.glob("*.pth"),
            *site.glob("__editable__*.py"),
            *site.glob("*.dist-info/direct_url.json"),
        ]
    for path in written:
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 100_000:
            text = path.read_bytes().replace(str(tree).encode(), b"/workspace")
            path.write_bytes(text.replace(str(venv).encode(), b"/opt/venv"))


def main(tree, folder, language, command=""):
    tree = Path(tree).resolve()
    folder = Path(folder).resolve()
    (folder / "venv" / "bin").mkdir(parents=True)
    before = set(tree.rglob("*"))
    status = run_setup(tree, folder, language, command)
    if status == 0:
        add_python(folder / "venv")
        keep_made(tree, folder, before)
        tell_paths(tree, folder / "venv")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
