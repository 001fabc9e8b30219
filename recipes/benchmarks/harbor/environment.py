"""What environment/ of a Harbor task makes, where no container is built: a workspace, packages, variables,
and the reasons why it would need one."""

import re
import shlex
import shutil
import string
import subprocess
from pathlib import Path

import yaml

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


def copy(source, target, root):
    """Copy a file, or what is in a folder, links as links. Raises ValueError where `..`, or a link of a copy
    before, leads out of root: the tasks are a stranger's; or where it would hold its own copy."""
    if root.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{source} holds the folder that it is to be copied into")
    for path in (source, *source.rglob("*")):
        place = target / path.relative_to(source)
        if not place.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"the copy of {path.name} leads out of its folder")
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)


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
    return isinstance(services, dict) and len(services) > 1


def variables_in(text, known):
    """{name: value} of an ENV or ARG line, with what is known before it in the place of $NAME."""
    if "=" not in text.partition(" ")[0]:
        text = text.replace(" ", "=", 1)
    pairs = [word.partition("=")[::2] for word in shlex.split(text)]
    return {name: string.Template(value).safe_substitute(known) for name, value in pairs}


def packages_of(command):
    """{"apt": [...]} or {"pip": [...]} that a command installs, {} where it changes nothing; else None."""
    words = [word for word in command if not word.startswith("-")]
    if "install" in words:
        names = [re.split(r"[=<>~!\[]", word)[0] for word in words[words.index("install") + 1 :]]
        if words[0] in ("apt-get", "apt"):
            return {"apt": names}
        if words[0] in ("pip", "pip3") or words[:2] in (["python", "pip"], ["uv", "pip"]):
            return {"pip": [name for name in names if "/" not in name]}
    return {} if changes_nothing(command, words) else None


def changes_nothing(command, words):
    """Does it clean up, or name the Python that the task's environment has?"""
    if words[:1] == ["ln"]:
        return words[-1] in ("/usr/bin/python", "/usr/local/bin/python")
    cleans = (["apt-get", "update"], ["apt-get", "clean"], ["apt", "update"], ["uv", "venv"])
    return words[:2] in cleans or command[:2] == ["rm", "-rf"]


class Environment:
    """What a task's environment/ makes: a working folder, files, packages; and what is beyond a sandbox."""

    def __init__(self, folder, settings):
        self.folder = folder
        self.known = {}  # of ARG and ENV
        self.variables = {}
        self.copies = []  # (file or folder, its place below the working folder)
        self.runs = []  # shell commands that make files there
        self.packages = {"apt": [], "pip": []}
        self.reasons = [name for key, name in BEYOND.items() if settings.get(key)]
        lines = read_dockerfile(folder / "Dockerfile")
        root = self.find_root(lines)
        self.root = str(Path("/", settings.get("workdir") or root))
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
            if word in ("ARG", "ENV", "WORKDIR"):
                getattr(self, f"read_{word.lower()}")(rest)
        root = self.here
        self.here = "/"
        return root

    def read_arg(self, rest):
        self.known |= variables_in(rest, self.known)

    def read_env(self, rest):
        self.read_arg(rest)
        for name in variables_in(rest, self.known):
            if not name.endswith("PATH"):  # which leads to places of the image
                self.variables[name] = self.known[name]

    def read_workdir(self, rest):
        self.here = str(self.place_of(rest))

    def place_of(self, text):
        plain = text.strip("\"'")
        return Path(self.here, string.Template(plain).safe_substitute(self.known))

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
        place = self.place_of(target)
        if not place.is_relative_to(self.root):
            self.reasons.append(f"files in {target}")
            return
        below = place.relative_to(self.root)
        for path in self.sources_of(sources):
            inside = path.is_file() and (target.endswith("/") or target in (".", self.root))
            self.copies.append((path, below / path.name if inside else below))

    def sources_of(self, names):
        for name in names:
            name = name.lstrip("/") or "."  # its root is the build's folder
            found = sorted(self.folder.glob(name)) if "*" in name else [self.folder / name]
            if any(path.exists() for path in found):
                yield from found
            else:
                yield self.folder.parent / name  # some build from the task's folder

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

    read_cmd = read_shell = read_label

    def read_other(self, rest):
        self.reasons.append(f"a line of the Dockerfile: {rest[:40]}")

    def make(self, target):
        """Fill the workspace; a command that fails is a reason. A link is copied as a link."""
        target.mkdir(parents=True, exist_ok=True)
        for source, below in self.copies:
            if not source.resolve().is_relative_to(self.folder.parent.resolve()):
                raise ValueError(f"COPY {source.name} leads out of the task's folder")
            if source.exists():
                copy(source, target / below, target)
            else:
                self.reasons.append(f"{source.name} is missing")
        for command in self.runs:
            place = ["--bind", str(target), self.root, "--chdir", self.root]
            for variable in self.variables.items():
                place += ["--setenv", *variable]
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
