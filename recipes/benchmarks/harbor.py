#!/usr/bin/env python3
"""Harbor's task folders (task.toml, instruction.md, environment, tests, solution) -> a task file, and back.

    python recipes/benchmarks/harbor.py in FOLDER --output_dir data/harbor --venv ENVIRONMENT
    python recipes/benchmarks/harbor.py out data/harbor/tasks.jsonl FOLDER

in: every folder below FOLDER with a task.toml, but those in a task. Its working folder becomes /workspace
(paths in its texts are changed), tests/ and solution/ become private, tests/test.sh runs under
harbor/check.sh. What its Dockerfile copies and writes below the working folder is the workspace; packages
that it installs must be in --venv or on this machine. A task that asks for more gets an "image", for 04 with
a container (`docker build -t IMAGE TASK/environment` makes it), and the reason is printed. Steps are turns.
out: a folder a task, a step a turn, with the row itself in task.toml, so that `in` gives the same row again.
The check's environment becomes packages of the Dockerfile. Tools and rounds are those of the other harness.
"""

import argparse
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import jsonschema
import yaml

HERE = Path(__file__).resolve().with_suffix("")
sys.path[:0] = [str(HERE.parents[2]), str(HERE)]
stage = importlib.import_module("04_eval")
environment = importlib.import_module("environment")
copy = environment.copy
STUBS = ("uv", "uvx", "pytest", "pip", "pip3", "apt", "apt-get", "curl")

# What a folder that is no task here may raise
FAULTS = (ValueError, OSError, RecursionError, subprocess.TimeoutExpired, yaml.YAMLError)

# The files that are read, and the folders that are copied
READ = "task.toml instruction.md tests tests/private solution environment/workspace environment/Dockerfile"
# What is read of a task.toml
VARIABLES = {"type": "object", "additionalProperties": {"type": "string"}}
TABLE = {"type": "object", "properties": {"timeout_sec": {"type": "number"}, "env": VARIABLES}}
PLACES = {"workdir": {"type": "string"}, "docker_image": {"type": "string"}}
STEP = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
TABLES = {name: TABLE for name in ("metadata", "agent", "verifier", "solution")}
TABLES |= {"environment": TABLE | {"properties": TABLE["properties"] | PLACES}}
TABLES |= {"steps": {"type": "array", "items": STEP}}
CONFIG = {"properties": TABLES}
# A task of ours, with what is written here for the other side's limits
SECONDS = dict.fromkeys(("agent_seconds", "verifier_seconds"), {"type": "number"})
META = {"meta": {"type": ["object", "null"], "properties": SECONDS}}
TASK = stage.TASK | {"type": "object", "properties": stage.TASK["properties"] | META}


# ----------------------------------------------------------------------------------------------------------
# In


def check_form(value, schema, what):
    """Raises ValueError: what is wrong with it."""
    if error := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value)):
        raise ValueError(f"{what}: {error.json_path.removeprefix('$.')}: {error.message[:200]}")


def make_new(folder):
    """Make it. Raises ValueError where something is in it: another run's file would be taken for a task's."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty: remove it, or name another folder")


def change_paths(folder, root, private="/private"):
    """Rename, in every text file below, the places that Harbor has to those that the sandbox has."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            try:
                text = path.read_bytes().decode()  # its ends of lines stay
            except UnicodeDecodeError:
                continue
            if (changed := renamed(text, root, private)) != text:
                path.write_bytes(changed.encode())


def renamed(text, root, private):
    places = {"/tests": f"{private}/tests", "/solution": f"{private}/solution"}
    places |= {root: "/workspace"} if root != "/" else {}  # a single stroke is many things
    places |= {"/logs/verifier": "/tmp/verifier", "/logs/agent": "/tmp/agent"}
    names = "|".join(map(re.escape, sorted(places, key=len, reverse=True)))
    return re.sub(rf"(?<![\w.$}}/-])({names})(?![\w-])", lambda match: places[match[1]], text)


def restore(folder, config, target):
    """The row that `out` wrote into a folder. Raises ValueError."""
    row = json.loads(str(config["metadata"]["limi_task"]))
    check_row(row)
    for key, place in (("workspace", "environment/workspace"), ("private", "tests/private")):
        if row.get(key):
            row[key] = f"{target.name}/{key}"
            copy(folder / place, target / key, target)
    return row


def fill_private(folder, target, root, steps):
    """tests/ and solution/ of every step, over those of the task, their places renamed; what runs them."""
    private = target / "private"
    for step in steps:
        for part in ("tests", "solution"):
            for source in dict.fromkeys((folder / part, folder / step / part)):
                if source.exists():
                    copy(source, private / step / part, private)
        change_paths(private / step, root, str(Path("/private", step)))
    change_paths(target / "workspace", root)
    private.joinpath("bin").mkdir(parents=True, exist_ok=True)
    for name in ("check.sh", "reward.py"):
        shutil.copy(HERE / name, private)
    for stub in STUBS:
        shutil.copy(HERE / "stub.sh", private / "bin" / stub)
        private.joinpath("bin", stub).chmod(0o755)


def read_config(folder):
    """task.toml, with the tables that it lacks. Raises ValueError: it cannot be a task here."""
    config = dict.fromkeys(TABLES, {}) | {"steps": []}
    config |= tomllib.loads(folder.joinpath("task.toml").read_text())
    check_form(config, CONFIG, "task.toml")
    if str(config["environment"].get("os", "linux")).lower() != "linux":
        raise ValueError("not for Linux")
    return config


def check_inside(folder, root):
    """Raises ValueError where a link leads out of the set: the tasks are a stranger's."""
    for place in (folder, *folder.glob("steps/*")):
        for path in map(place.joinpath, READ.split()):
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"{path.relative_to(folder)} leads out of {root}")


def steps_of(folder, config):
    """[place of a step in the task's folder, "." for a task of one]. Raises ValueError."""
    steps = [f"steps/{step['name']}" for step in config["steps"]] or ["."]
    for step in steps:
        if not re.fullmatch(r"[\w./-]+", step) or ".." in step:
            raise ValueError(f"the step {step} names no folder")
        if folder.joinpath(step, "workdir").exists():
            raise ValueError(f"{step} brings files of its own")
        if not any(folder.joinpath(place, "tests", "test.sh").is_file() for place in (step, ".")):
            raise ValueError("no tests/test.sh")
    return steps


def with_variables(command, *tables):
    """The command, with the variables of the tables set. Raises ValueError: one is of the user's machine."""
    words = []
    for table in tables:
        words += [f"{name}={value}" for name, value in table.items()]
    if asked := [word for word in words if "${" in word]:
        raise ValueError(f"needs a variable of your machine: {asked[0]}")
    return f"env {shlex.join(words)} {command}" if words else command


def task_of(folder, options):
    """(row, [reason why it needs a container]). Raises ValueError: it cannot be a task here."""
    check_inside(folder, options.folder.resolve())
    config = read_config(folder)
    parts = folder.relative_to(options.folder).parts or [folder.resolve().name]
    name = re.sub(r"[^\w.@#-]", "-", "-".join(parts))
    target = options.output_dir / name
    if target.exists():
        raise ValueError(f"another task is called {name}")
    if "limi_task" in config["metadata"]:
        return restore(folder, config, target), []
    steps = steps_of(folder, config)
    made = environment.Environment(folder / "environment", config["environment"])
    made.make(target / "workspace")
    fill_private(folder, target, made.root, steps)
    row = {"query_id": name, "domain": "vibe_coding", "source": "harbor"}
    row["turns"] = [turn_of(folder, step, config, made) for step in steps]
    row |= {"workspace": f"{name}/workspace", "private": f"{name}/private", "venv": str(options.venv)}
    if programs := dict.fromkeys(filter(environment.program_path, made.packages["apt"])):
        row["needs"] = list(programs)
    limits = {part: config[part].get("timeout_sec") for part in ("agent", "verifier")}
    check_row(row)
    row["meta"] = {f"{part}_seconds": seconds for part, seconds in limits.items() if seconds}
    reasons = made.reasons + environment.absent(made.packages, options.venv)
    if config["verifier"].get("environment"):
        reasons.append("a container for its verifier")
    if reasons:
        row["image"] = config["environment"].get("docker_image") or f"harbor-{name.lower()}"
    return row, reasons


def turn_of(folder, step, config, made):
    private = str(Path("/private", step))
    query = folder.joinpath(step, "instruction.md").read_text()
    query = re.sub(r"^(?:(?:<!--|#).*canary.*\n\s*)+", "", query).strip()
    if not query:
        raise ValueError("instruction.md is empty")
    variables = made.variables | config["environment"].get("env", {})
    check = with_variables(f"bash /private/check.sh {private}", variables, config["verifier"].get("env", {}))
    turn = {"query": renamed(query, made.root, private)}
    turn["check"] = renamed(check, made.root, private)
    if any(folder.joinpath(place, "solution", "solve.sh").exists() for place in (step, ".")):
        solve = f"bash {private}/solution/solve.sh"
        solve = with_variables(solve, variables, config["solution"].get("env", {}))
        turn["solution"] = f"PATH=/private/bin:$PATH {renamed(solve, made.root, private)}"
    return turn


def task_folders(root):
    """The tasks' folders; what lies in one is its own. Raises ValueError where there is none."""
    folders = {file.parent for file in root.rglob("task.toml")}
    if not folders:
        raise ValueError(f"{root}: no task.toml below it")
    return sorted(folder for folder in folders if folders.isdisjoint(folder.parents))


def read_folders(options):
    """`in`: every task below the folder."""
    folders = task_folders(options.folder)
    make_new(options.output_dir)
    rows = []
    ids = set()
    here = 0
    for folder in folders:
        try:
            row, reasons = task_of(folder, options)
            if row["query_id"] in ids:
                raise ValueError(f"another task has the query_id {row['query_id']}")
        except FAULTS as error:
            print(f"left out: {folder}: {' '.join(str(error).split())[:120]}")
            continue
        rows.append(row)
        ids.add(row["query_id"])
        here += "image" not in row
        if reasons:
            print(f"needs a container: {row['query_id']}: {'; '.join(dict.fromkeys(reasons))[:150]}")
    path = options.output_dir / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    solved = sum("solution" in row["turns"][0] for row in rows)
    counts = f"{len(rows)} of {len(folders)} tasks, {here} of them for bubblewrap, {solved} with a solution"
    print(f"{path}: {counts}")
    for part, flag in (("agent", "max_seconds"), ("verifier", "check_seconds")):
        longest = max((row["meta"].get(f"{part}_seconds", 0) for row in rows if "meta" in row), default=0)
        if longest:
            print(f"the longest {part} may take {longest:.0f} s: 04_eval.py --{flag} {longest:.0f}")


# ----------------------------------------------------------------------------------------------------------
# Out


def write_folders(options):
    """`out`: a folder a task."""
    rows = list(stage.read_jsonl(options.folder))
    make_new(options.output_dir)
    written = 0
    for where, row in rows:
        try:
            check_row(row)
            if why := why_not(row):
                print(f"left out: {where}: {row['query_id']}: {why}")
                continue
            row = with_places(row, options.folder.parent)
            write_folder(row, options.folder.parent, options.output_dir / row["query_id"])
        except (ValueError, OSError, tarfile.TarError) as error:
            raise ValueError(f"{where}: {error}") from None
        written += 1
    print(f"{options.output_dir}: {written} of {len(rows)} tasks")


def check_row(row):
    """Raises ValueError: what is wrong with it."""
    check_form(row, TASK, "no task")
    if not row["query_id"].strip("."):
        raise ValueError("no task: query_id names no folder")


def with_places(row, source):
    """The row, with the full path of its environment. Raises ValueError where a folder is missing."""
    for key in ("workspace", "private", "venv"):
        if row.get(key):
            place = stage.full_path(row["query_id"], key, source / row[key])
    return row | {"venv": str(place)} if row.get("venv") else row


def why_not(row):
    """Why a task cannot be one of Harbor's, or None."""
    unchecked = [number for number, turn in enumerate(row["turns"], 1) if "check" not in turn]
    return f"turn {unchecked[0]} has no check, a rubric has no place there" if unchecked else None


def write_folder(row, source, target):
    """One task; the checks share tests/, a task of several turns has a step for each."""
    for part in ("environment/workspace", "tests"):
        target.joinpath(part).mkdir(parents=True)
    if row.get("workspace"):
        copy_workspace(source / row["workspace"], target / "environment" / "workspace")
    private = source / row["private"] if row.get("private") else None
    if private:
        copy(private, target / "tests" / "private", target)
    shutil.copy(HERE / "test.sh", target / "tests")
    target.joinpath("environment", "Dockerfile").write_text("\n".join(dockerfile_of(row)) + "\n")
    settings = HERE.joinpath("task.toml").read_text()
    text = json.dumps(json.dumps(row)).replace("\x7f", "\\u007f")  # a JSON string of ASCII is one of TOML
    settings = settings.replace('"ROW"', text)
    for part, seconds in (("agent", "3600.0"), ("verifier", "600.0")):
        limit = str(float((row.get("meta") or {}).get(f"{part}_seconds", seconds)))
        settings = settings.replace(f"[{part}]\ntimeout_sec = {seconds}", f"[{part}]\ntimeout_sec = {limit}")
    for number, turn in enumerate(row["turns"], 1):
        folder = target
        if len(row["turns"]) > 1:
            folder = target / "steps" / f"turn{number}"
            settings += f'\n[[steps]]\nname = "turn{number}"\n'
        write_turn(turn, row.get("system") if number == 1 else None, private, folder)
    target.joinpath("task.toml").write_text(settings)


def write_turn(turn, system, private, folder):
    folder.joinpath("tests").mkdir(parents=True, exist_ok=True)
    folder.joinpath("instruction.md").write_text(f"{system}\n\n{turn['query']}" if system else turn["query"])
    folder.joinpath("tests", "check.sh").write_text(turn["check"])
    if "solution" in turn:
        folder.joinpath("solution").mkdir()
        folder.joinpath("solution", "solution.sh").write_text(turn["solution"])
        shutil.copy(HERE / "solve.sh", folder / "solution")
        if private:
            copy(private, folder / "solution" / "private", folder)


def dockerfile_of(row):
    """The lines of the Dockerfile: the check's Python and packages, what the task needs, the workspace."""
    if row.get("image"):
        lines = [f"FROM {row['image']}"]
    elif row.get("venv"):
        version, packages = installed_in(Path(row["venv"]))
        install = f"/opt/venv/bin/pip install --no-deps {' '.join(packages)}"
        lines = [f"FROM python:{version}-bookworm", f"RUN python3 -m venv /opt/venv && {install}"]
        lines.append("ENV PATH=/opt/venv/bin:$PATH")
    else:
        lines = ["FROM python:3.12-bookworm"]
    for program in row.get("needs", []):
        if program != "network":
            lines.append(f"RUN command -v {shlex.quote(program)}")
    return [*lines, "WORKDIR /workspace", "COPY workspace/ /workspace/"]


def installed_in(venv):
    """("3.12", ["package==version"]) of a Python environment; raises ValueError where there is none."""
    site = next(venv.glob("lib/python3*/site-packages"), None)
    if not site:
        raise ValueError(f"venv: {venv} is no Python environment")
    names = sorted(path.stem for path in site.glob("*.dist-info"))
    return site.parent.name.removeprefix("python"), [name.replace("-", "==", 1) for name in names]


def copy_workspace(source, target):
    if source.is_dir():
        copy(source, target, target)
    else:
        shutil.unpack_archive(source, target, "tar", filter="tar")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    reader = commands.add_parser("in", help="Harbor's folders -> a task file.")
    reader.add_argument("folder", type=Path)
    reader.add_argument("--output_dir", type=Path, default=Path("data/harbor"))
    reader.add_argument("--venv", type=Path, default=Path(sys.prefix), help="Has the packages of the tasks.")
    writer = commands.add_parser("out", help="A task file -> Harbor's folders.")
    writer.add_argument("folder", type=Path, metavar="tasks.jsonl")
    writer.add_argument("output_dir", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_options()
    try:
        read_folders(options) if options.command == "in" else write_folders(options)
    except (ValueError, OSError) as error:
        print(f"harbor.py: {error}", file=sys.stderr)
        sys.exit(2)
