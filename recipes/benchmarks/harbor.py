#!/usr/bin/env python3
"""Harbor's task folders (task.toml, instruction.md, environment, tests, solution) -> a task file, and back.

    python recipes/benchmarks/harbor.py in FOLDER --output_dir data/harbor --venv ENVIRONMENT
    python recipes/benchmarks/harbor.py out data/harbor/tasks.jsonl FOLDER

in: every folder below FOLDER with a task.toml. Its working folder becomes /workspace (paths in its texts are
changed), tests/ and solution/ become private, tests/test.sh runs under harbor/check.sh. What its Dockerfile
copies and writes below the working folder is the workspace; packages that it installs must be in --venv or on
this machine. A task that asks for more gets an "image", for 04 with a container (`docker build -t IMAGE
TASK/environment` makes it); the reason is printed.
out: a folder a task, a step a turn, with the row itself in task.toml, so that `in` gives the same row again.
The check's environment becomes packages of the Dockerfile. Tools and rounds are those of the other harness.
"""

import argparse
import json
import re
import shlex
import shutil
import string
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().with_suffix("")
STUBS = ("uv", "uvx", "pytest", "pip", "pip3", "apt", "apt-get", "curl")
# What a base image brings, by the start of its name; the rest is Debian's, as here
BASES = {"ubuntu": None, "debian": None, "python": "python3", "rust": "cargo", "node": "node", "golang": "go"}
BASES |= {"gcc": "g++", "ghcr.io/laude-institute/t-bench/ubuntu": "python3"}
# Debian packages taken to be there: libraries (Python's wheels bring theirs), Python, a session's recorder
TAKEN = ("lib", "python3", "ca-certificates", "tmux", "asciinema", "procps")
KNOWN = ("/logs", "/tests", "/solution", "/tmp", "/workspace")  # folders that are here too
# What a task's [environment] may ask for and no sandbox has
BEYOND = {"gpus": "a GPU", "tpu": "a TPU", "mcp_servers": "MCP servers"}
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"  # what the sandbox shows of this machine
SANDBOX = """bwrap --unshare-all --die-with-parent --new-session --clearenv --ro-bind /usr /usr
    --ro-bind-try /etc/alternatives /etc/alternatives --symlink usr/bin /bin --symlink usr/lib /lib
    --symlink usr/lib64 /lib64 --proc /proc --dev /dev --tmpfs /tmp"""


def program_path(name):
    """Where the sandbox would find a program, or None."""
    return shutil.which(name, path=SYSTEM_PATH)


# ----------------------------------------------------------------------------------------------------------
# The Dockerfile


def read_dockerfile(path):
    """[(instruction, rest)] with continued lines joined; [] where there is none."""
    if not path.exists():
        return []
    text = re.sub(r"^\s*#.*\n", "", path.read_text(errors="replace"), flags=re.MULTILINE)
    text = re.sub(r"\\\s*\n", " ", text)
    lines = [line.strip().split(None, 1) for line in text.splitlines() if line.strip()]
    return [(line[0].upper(), line[1] if len(line) > 1 else "") for line in lines]


def commands_of(text):
    """[[word, ...]] of a RUN line. Raises ValueError: quotes that do not close."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    commands = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def has_several_services(compose):
    content = yaml.safe_load(compose.read_text())
    services = content.get("services") if isinstance(content, dict) else None
    return len(services or ()) > 1


def variables_in(text):
    """{name: value} of an ENV line, but for what leads to places of the image (PATH and the like)."""
    if "=" not in text.partition(" ")[0]:
        text = text.replace(" ", "=", 1)
    pairs = [word.partition("=")[::2] for word in shlex.split(text)]
    return {name: value for name, value in pairs if not name.endswith("PATH")}


def packages_of(command):
    """{"apt": [...]} or {"pip": [...]} that a command installs, {} for one that only cleans up; else None."""
    words = [word for word in command if not word.startswith("-")]
    if "install" in words:
        names = [re.split(r"[=<>~!\[]", word)[0] for word in words[words.index("install") + 1 :]]
        if words[0] in ("apt-get", "apt"):
            return {"apt": names}
        if words[0] in ("pip", "pip3") or words[:2] in (["python", "pip"], ["uv", "pip"]):
            return {"pip": [name for name in names if "/" not in name]}
    cleans = (["apt-get", "update"], ["apt-get", "clean"], ["apt", "update"], ["uv", "venv"])
    return {} if words[:2] in cleans or command[:2] == ["rm", "-rf"] else None


class Environment:
    """What a task's environment/ makes: a working folder, files, packages; and what is beyond a sandbox."""

    def __init__(self, folder, settings):
        self.folder = folder
        self.variables = {}
        self.copies = []  # (file or folder, its place below the working folder)
        self.runs = []  # shell commands that make files there
        self.packages = {"apt": [], "pip": []}
        self.reasons = [name for key, name in BEYOND.items() if settings.get(key)]
        lines = read_dockerfile(folder / "Dockerfile")
        root = self.find_root(lines)
        self.root = settings.get("workdir") or root
        if self.root == "/" or "$" in self.root:
            self.reasons.append("no working folder")
        if any(map(has_several_services, folder.glob("*compose*.y*ml"))):
            self.reasons.append("several containers")
        if not lines:
            self.reasons.append(f"image {settings.get('docker_image')}")
        for word, rest in lines:
            getattr(self, f"read_{word.lower()}", self.read_other)(rest)

    def find_root(self, lines):
        """The last WORKDIR, of which a COPY before it must know."""
        self.here = "/"
        for word, rest in lines:
            if word == "ENV":
                self.read_env(rest)
            if word == "WORKDIR":
                self.read_workdir(rest)
        root = self.here
        self.here = "/"
        return root

    def read_env(self, rest):
        self.variables |= variables_in(rest)

    def read_workdir(self, rest):
        self.here = str(Path(self.here, string.Template(rest).safe_substitute(self.variables)))

    def read_from(self, rest):
        name = " ".join(word for word in rest.split() if not word.startswith("--")).partition(" ")[0]
        base = [start for start in BASES if name.startswith(start)]
        program = BASES[base[0]] if base else None
        if not base or program and not program_path(program):
            self.reasons.append(f"image {name}")

    def read_copy(self, rest):
        words = [word for word in rest.split() if not word.startswith(("--chown", "--chmod"))]
        if rest.startswith("--from=ghcr.io/astral-sh/uv"):
            return
        if rest.startswith(("--from", "[")) or len(words) < 2:
            self.reasons.append(f"COPY {rest[:40]}")
            return
        *sources, target = words
        place = Path(self.here, string.Template(target).safe_substitute(self.variables))
        if not place.is_relative_to(self.root):
            self.reasons.append(f"files in {target}")
            return
        below = place.relative_to(self.root)
        for path in self.sources_of(sources):
            inside = path.is_file() and (target.endswith("/") or target in (".", self.root))
            self.copies.append((path, below / path.name if inside else below))

    def sources_of(self, names):
        for name in names:
            if "*" in name:
                yield from sorted(self.folder.glob(name))
            else:
                path = self.folder / name
                # some build from the task's folder
                yield path if path.exists() else self.folder.parent / name

    def read_run(self, rest):
        try:
            commands = commands_of(rest)
        except ValueError:
            commands = [["?"]]
        others = []
        for command in commands:
            found = packages_of(command)
            if found is None:
                others.append(command)
                continue
            for kind, names in found.items():
                self.packages[kind] += names
        if others and self.root in rest:
            self.runs.append(rest)  # tried, without the network
            return
        for command in others:
            folders = [word for word in command[1:] if not word.startswith(("-", *KNOWN))]
            if command[0] != "mkdir" or folders:
                self.reasons.append(f"RUN {' '.join(command)[:40]}")

    def read_label(self, rest):
        pass  # nothing of it is seen here

    read_cmd = read_arg = read_shell = read_label

    def read_other(self, rest):
        self.reasons.append(f"a line of the Dockerfile: {rest[:40]}")

    def make(self, target):
        """Fill the workspace; a command that fails is a reason. A link is copied as a link."""
        target.mkdir(parents=True, exist_ok=True)
        for source, below in self.copies:
            if not source.resolve().is_relative_to(self.folder.parent.resolve()):
                raise ValueError(f"COPY {source.name} leads out of the task's folder")
            if source.is_dir():
                copy_tree(source, target / below)
            elif source.exists():
                (target / below).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / below, follow_symlinks=False)
            else:
                self.reasons.append(f"{source.name} is missing")
        for command in self.runs:
            place = ["--bind", str(target), self.root, "--chdir", self.root]
            words = [*shlex.split(SANDBOX), *place, "bash", "-c", without_installs(command)]
            result = subprocess.run(words, capture_output=True, text=True, timeout=60)
            if result.returncode:
                self.reasons.append(f"RUN {command[:40]}: {result.stderr.strip()[-60:]}")


def without_installs(text):
    """A RUN line with `apt-get ... &&` and the like taken out."""
    parts = re.split(r"\s*&&\s*", text)
    return " && ".join(part for part in parts if packages_of(part.split() or ["?"]) is None) or "true"


def absent(packages, venv):
    """[package that neither the environment nor this machine has]."""
    present = set()
    for info in venv.glob("lib/python*/site-packages/*.dist-info"):
        present.add(re.sub(r"[-_.]+", "-", info.name.split("-")[0]).lower())
    wanted = {re.sub(r"[-_.]+", "-", name).lower(): name for name in packages["pip"]}
    missing = [f"pip {name}" for key, name in wanted.items() if key not in present]
    tools = [name for name in dict.fromkeys(packages["apt"]) if not name.startswith(TAKEN)]
    for name in tools:
        command = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}", name]
        installed = subprocess.run(command, capture_output=True, text=True).stdout.startswith("ii")
        if not installed and not program_path(name):
            missing.append(f"apt {name}")
    return missing


# ----------------------------------------------------------------------------------------------------------
# In


def copy_tree(source, target):
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)


def make_new(folder):
    """Make it. Raises ValueError where something is in it: another run's file would be taken for a task's."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty: remove it, or name another folder")


def change_paths(folder, root):
    """Rename, in every text file below, the places that Harbor has to those that the sandbox has."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            try:
                text = path.read_text()
            except UnicodeDecodeError:
                continue
            path.write_text(renamed(text, root))


def renamed(text, root):
    places = {"/tests": "/private/tests", "/solution": "/private/solution", "/logs/verifier": "/tmp/verifier"}
    places |= {"/logs/agent": "/tmp/agent", root: "/workspace"}
    names = "|".join(map(re.escape, sorted(places, key=len, reverse=True)))
    return re.sub(rf"(?<![\w.$}}/-])({names})(?![\w-])", lambda match: places[match[1]], text)


def restore(folder, config, target):
    """The row that `out` wrote into a folder. Raises ValueError."""
    row = task_in(config["metadata"]["limi_task"])
    for key, place in (("workspace", "environment/workspace"), ("private", "tests/private")):
        if key in row:
            row[key] = f"{target.name}/{key}"
            copy_tree(folder / place, target / key)
    return row


def fill_private(folder, target, root):
    """tests/ and solution/ of the task, its places renamed, and what runs them."""
    for part in ("tests", "solution"):
        if folder.joinpath(part).exists():
            copy_tree(folder / part, target / "private" / part)
    change_paths(target, root)
    target.joinpath("private", "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "check.sh", target / "private")
    for stub in STUBS:
        shutil.copy(HERE / "stub.sh", target / "private" / "bin" / stub)
        target.joinpath("private", "bin", stub).chmod(0o755)


def read_config(folder):
    """task.toml, its tables that are read here made sure of. Raises ValueError: it cannot be a task here."""
    config = tomllib.loads(folder.joinpath("task.toml").read_text())
    for name in ("metadata", "environment", "agent", "verifier", "solution"):
        if not isinstance(config.setdefault(name, {}), dict):
            raise ValueError(f"task.toml: {name} is no table")
    if "limi_task" in config["metadata"]:
        return config
    if config.get("steps"):
        raise ValueError("several steps")
    if str(config["environment"].get("os", "linux")).lower() != "linux":
        raise ValueError("not for Linux")
    if not folder.joinpath("tests", "test.sh").exists():
        raise ValueError("no tests/test.sh")
    return config


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
    config = read_config(folder)
    name = re.sub(r"[^\w.@#-]", "-", str(folder.relative_to(options.folder)) or folder.name)
    target = options.output_dir / name
    if target.exists():
        raise ValueError(f"another task is called {name}")
    if "limi_task" in config["metadata"]:
        return restore(folder, config, target), []
    environment = Environment(folder / "environment", config["environment"])
    environment.make(target / "workspace")
    fill_private(folder, target, environment.root)
    row = {"query_id": name, "domain": "vibe_coding", "source": "harbor"}
    row["turns"] = [turn_of(folder, config, environment)]
    row |= {"workspace": f"{name}/workspace", "private": f"{name}/private", "venv": str(options.venv)}
    if programs := dict.fromkeys(filter(program_path, environment.packages["apt"])):
        row["needs"] = list(programs)
    limits = {part: config[part].get("timeout_sec") for part in ("agent", "verifier")}
    row["meta"] = {f"{part}_seconds": seconds for part, seconds in limits.items() if seconds}
    reasons = environment.reasons + absent(environment.packages, options.venv)
    if config["verifier"].get("environment"):
        reasons.append("a container for its verifier")
    if reasons:
        row["image"] = config["environment"].get("docker_image") or f"harbor-{name.lower()}"
    return row, reasons


def turn_of(folder, config, environment):
    query = re.sub(r"^(?:(?:<!--|#).*canary.*\n\s*)+", "", folder.joinpath("instruction.md").read_text())
    variables = environment.variables | config["environment"].get("env", {})
    check = with_variables("bash /private/check.sh", variables, config["verifier"].get("env", {}))
    turn = {"query": renamed(query, environment.root).strip(), "check": renamed(check, environment.root)}
    if folder.joinpath("solution", "solve.sh").exists():
        solve = "bash /private/solution/solve.sh"
        solve = with_variables(solve, variables, config["solution"].get("env", {}))
        turn["solution"] = f"PATH=/private/bin:$PATH {renamed(solve, environment.root)}"
    return turn


def read_folders(options):
    """`in`: every task below the folder."""
    files = sorted(options.folder.rglob("task.toml"))
    if not files:
        raise ValueError(f"{options.folder}: no task.toml below it")
    make_new(options.output_dir)
    rows = []
    ids = set()
    here = 0
    for file in files:
        try:
            row, reasons = task_of(file.parent, options)
            if row["query_id"] in ids:
                raise ValueError(f"another task has the query_id {row['query_id']}")
        except (ValueError, OSError, subprocess.TimeoutExpired, yaml.YAMLError) as error:
            print(f"left out: {file.parent}: {' '.join(str(error).split())[:120]}")
            continue
        rows.append(row)
        ids.add(row["query_id"])
        here += "image" not in row
        if reasons:
            print(f"needs a container: {row['query_id']}: {'; '.join(dict.fromkeys(reasons))[:150]}")
    write_rows(options.output_dir / "tasks.jsonl", rows)
    solved = sum("solution" in row["turns"][0] for row in rows)
    counts = f"{len(rows)} of {len(files)} tasks, {here} of them for bubblewrap, {solved} with a solution"
    print(f"{options.output_dir}/tasks.jsonl: {counts}")
    for part, flag in (("agent", "max_seconds"), ("verifier", "check_seconds")):
        longest = max((row["meta"].get(f"{part}_seconds", 0) for row in rows if "meta" in row), default=0)
        if longest:
            print(f"the longest {part} may take {longest:.0f} s: 04_eval.py --{flag} {longest:.0f}")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------
# Out


def write_folders(options):
    """`out`: a folder a task."""
    rows = read_rows(options.folder)
    make_new(options.output_dir)
    written = 0
    for number, row in enumerate(rows, 1):
        if why := why_not(row):
            print(f"left out: {options.folder}:{number}: {row['query_id']}: {why}")
            continue
        write_folder(row, options.folder.parent, options.output_dir / row["query_id"])
        written += 1
    print(f"{options.output_dir}: {written} of {len(rows)} tasks")


def read_rows(path):
    """[row]. Raises ValueError naming the line and what is wrong with it."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(task_in(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return rows


def task_in(text):
    """The row in a line. Raises ValueError: what is wrong with it."""
    try:
        row = json.loads(text)
        if not re.fullmatch(r"[\w.@#-]*[\w@#-][\w.@#-]*", row["query_id"]):
            raise ValueError("query_id names no folder")
        if not all(turn["query"] for turn in row["turns"]):
            raise ValueError("a turn without a query")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no task: {type(error).__name__}: {error}") from None
    return row


def why_not(row):
    """Why a task cannot be one of Harbor's, or None."""
    unchecked = [number for number, turn in enumerate(row["turns"], 1) if "check" not in turn]
    return f"turn {unchecked[0]} has no check, a rubric has no place there" if unchecked else None


def write_folder(row, source, target):
    """One task; the checks share tests/, a task of several turns has a step for each."""
    if row.get("venv"):
        row = row | {"venv": str((source / row["venv"]).absolute())}
    for part in ("environment/workspace", "tests"):
        target.joinpath(part).mkdir(parents=True)
    if row.get("workspace"):
        copy_workspace(source / row["workspace"], target / "environment" / "workspace")
    private = source / row["private"] if row.get("private") else None
    if private:
        copy_tree(private, target / "tests" / "private")
    shutil.copy(HERE / "test.sh", target / "tests")
    target.joinpath("environment", "Dockerfile").write_text("\n".join(dockerfile_of(row)) + "\n")
    settings = HERE.joinpath("task.toml").read_text()
    text = json.dumps(json.dumps(row)).replace("\x7f", "\\u007f")  # a JSON string of ASCII is one of TOML
    settings = settings.replace('"ROW"', text)
    for part, seconds in (("agent", "3600.0"), ("verifier", "600.0")):
        limit = str(float(row.get("meta", {}).get(f"{part}_seconds", seconds)))
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
            copy_tree(private, folder / "solution" / "private")


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
    [site] = venv.glob("lib/python3*/site-packages")
    names = sorted(path.stem for path in site.glob("*.dist-info"))
    return site.parent.name.removeprefix("python"), [name.replace("-", "==", 1) for name in names]


def copy_workspace(source, target):
    if source.is_dir():
        copy_tree(source, target)
    else:
        subprocess.run(["tar", "-xf", source, "-C", target], check=True)


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
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"harbor.py: {error}", file=sys.stderr)
        sys.exit(2)
