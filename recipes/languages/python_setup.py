"""The environment of a Python repository: the package itself, editable, and what it declares for its tests.

Run by 01_build_queries.py in the repository's tree, with network. uv is used where it is installed.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

TESTS = re.compile(r"(?i)^(all[-_])?(tests?|testing)([-_].*)?$")
FILES = re.compile(
    r"(?i)(requirements/tests?|requirements[-_]tests?|tests?[-_]requirements|tests?/requirements)\.txt$"
)


def read_project():
    """pyproject.toml as a dict; {} where there is none or it cannot be read."""
    try:
        return tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def install_commands(project):
    """[(arguments of pip install, must it succeed)] in their order."""
    commands = []
    if (
        Path("setup.py").exists()
        or Path("setup.cfg").exists()
        or {"project", "build-system"} & project.keys()
    ):
        commands.append(("-e .", True))
    commands.append(("pytest", True))
    extras = project.get("project", {}).get("optional-dependencies", {})
    commands += [(f"-e .[{name}]", False) for name in extras if TESTS.match(name)]
    commands += [
        (f"--group {name}", False) for name in project.get("dependency-groups", {}) if TESTS.match(name)
    ]
    files = [path for path in sorted(Path().rglob("*.txt")) if FILES.search(str(path))]
    return commands + [(f"-r {shlex.quote(str(path))}", False) for path in files]


def main():
    environment = os.environ["ENVIRONMENT"]
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = f"{environment}/bin/python -m pip install -q --disable-pip-version-check"
    if shutil.which("uv"):
        pip = f"uv pip install -q --python {environment}/bin/python"
    else:
        subprocess.run(shlex.split(f"{pip} -U pip"))  # an old one knows no --group
    for arguments, required in install_commands(read_project()):
        print(f"$ pip install {arguments}", flush=True)
        if subprocess.run(shlex.split(f"{pip} {arguments}")).returncode and required:
            sys.exit(f"pip install {arguments} failed")
    print("runner: pytest")


if __name__ == "__main__":
    main()
