"""Codex's tools (names and parameters of 0.130 to 0.169 and of the releases before; the words are ours):

    python 04_eval.py --tools recipes/tools/codex.py ...    # functions, run beside the server
    python 02_format_trajectories.py ~/.codex/sessions      # schemas of rollouts, which hold none

The server gives ROOT, clip(text) and run_command(command, folder, seconds) -> (exit code, stdout, stderr).
What needs a network, a person or another agent says so in one line.
"""
import os
import re
import shlex
import subprocess
import tempfile
import time

TOOLS = []
SESSIONS = {}  # number: [a command that still runs, the file that it writes to, bytes told so far]
STEP = {
    "type": "object",
    "properties": {
        "step": {"type": "string"},
        "status": {"type": "string", "enum": ["pending", "in_progress", "completed"]},
    },
    "required": ["step", "status"],
}
# What asks a person to let a command out of Codex's own sandbox; there is nobody to ask
ESCALATION = {"sandbox_permissions": "string", "justification": "string",
              "prefix_rule": {"type": "array", "items": {"type": "string"}}}  # fmt: skip


def tool(text, **properties):
    """Adds the function below to TOOLS. A property is a JSON schema or "type: description"; it is required
    where the function has no default for it."""

    def add(function):
        described = {}
        for key, value in properties.items():
            if isinstance(value, str):
                kind, _, told = value.partition(": ")
                value = {"type": kind} | ({"description": told} if told else {})
            described[key] = value
        code = function.__code__
        required = code.co_varnames[: code.co_argcount - len(function.__defaults__ or ())]
        parameters = {"type": "object", "properties": described, "required": list(required)}
        schema = {"name": function.__name__, "description": text, "parameters": parameters}
        TOOLS.append({"type": "function", "function": schema})
        return function

    return add


def full(path):
    return os.path.join(ROOT, path or "")  # noqa: F821


def text_of(path):
    if not os.path.isfile(path):
        raise ValueError(f"Failed to read file: {path}")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return file.read(50_000_000)


# Commands
@tool("Run a command; while it still runs after the yield time, its session is given back.",
      cmd="string: Shell command.", workdir="string: Folder to run it in.",
      shell="string: Shell to run it with.",
      login="boolean: Run a login shell.", tty="boolean: Give it a terminal.",
      yield_time_ms="number: How long to wait for output, 10000 if left out.",
      max_output_tokens="number: Longer output is cut.", **ESCALATION)  # fmt: skip
def exec_command(cmd, workdir="", shell="bash", login=True, tty=False, yield_time_ms=10_000, **options):
    log = tempfile.NamedTemporaryFile("rb", prefix="session-")
    with open(log.name, "wb") as output:
        process = subprocess.Popen(
            [os.path.basename(shell), "-c", cmd],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=full(workdir),
            start_new_session=True,
        )
    number = 1000 + len(SESSIONS)
    SESSIONS[number] = [process, log, 0]
    return news_of(number, yield_time_ms)


def news_of(number, wait):
    """What the command of a session wrote since the last look, at most `wait` milliseconds from now."""
    process, log, told = SESSIONS[number]
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < wait / 1000:
        time.sleep(0.02)
    log.seek(told)
    text = log.read(50_000_000)
    SESSIONS[number][2] += len(text)
    state = f"Process exited with code {process.returncode}"
    if process.returncode is None:
        state = f"Process running with session ID {number}"
    spent = time.monotonic() - started
    output = clip(text.decode("utf-8", "replace"))  # noqa: F821
    return f"Wall time: {spent:.4f} seconds\n{state}\nOutput:\n{output}"


@tool("Write to the input of a command that still runs, and read what it writes.", session_id="number",
      chars="string: Empty to read only.", yield_time_ms="number", max_output_tokens="number")  # fmt: skip
def write_stdin(session_id, chars="", yield_time_ms=250, max_output_tokens=None):
    if session_id not in SESSIONS:
        raise ValueError(f"Unknown session {session_id}")
    process = SESSIONS[session_id][0]
    if chars and process.poll() is None:
        process.stdin.write(chars.encode())
        process.stdin.flush()
    return news_of(session_id, yield_time_ms)


@tool("Run a shell command.", command="string", workdir="string", timeout_ms="number", login="boolean",
      **ESCALATION)  # fmt: skip
def shell_command(command, workdir="", timeout_ms=None, login=True, **options):
    seconds = timeout_ms / 1000 if timeout_ms else None
    started = time.monotonic()
    code, output, _ = run_command(f"exec 2>&1\n{command}", full(workdir), seconds)  # noqa: F821
    spent = time.monotonic() - started
    if code is None:
        code, output = 124, f"command timed out after {spent * 1000:.0f} milliseconds\n{output}"
    return f"Exit code: {code}\nWall time: {spent:.1f} seconds\nOutput:\n{output}"


@tool("Run a command, given as the list of its words.",
      command={"type": "array", "items": {"type": "string"}}, workdir="string", timeout_ms="number",
      **ESCALATION)  # fmt: skip
def shell(command, workdir="", timeout_ms=None, **options):
    return shell_command(shlex.join(command), workdir, timeout_ms)


@tool("Run a command, given as the list of its words.",
      command={"type": "array", "items": {"type": "string"}}, working_directory="string", timeout_ms="number",
      env="object", type="string", user="string")  # fmt: skip
def local_shell(command, working_directory="", timeout_ms=None, **options):
    return shell_command(shlex.join(command), working_directory, timeout_ms)


# Files
@tool("Change files by a patch: *** Begin Patch; *** Add File: PATH with + lines, *** Delete File: PATH, "
      "*** Update File: PATH with @@ and lines of ' ', - or +; *** End Patch.", input="string")  # fmt: skip
def apply_patch(input):
    lines = input.strip().splitlines()
    if lines[0].strip() != "*** Begin Patch" or lines[-1].strip() != "*** End Patch":
        raise ValueError("Invalid patch: it must start with *** Begin Patch and end with *** End Patch.")
    files, told = {}, []  # files: path -> its new text, None where it goes
    sections = re.split(r"(?m)^\*\*\* (Add|Delete|Update) File: ", "\n".join(lines[1:-1]))
    if len(sections) < 3 or sections[0].strip():
        raise ValueError(f"Invalid patch: no file header before {(sections[0].strip() or 'its end')[:80]!r}")
    for kind, section in zip(sections[1::2], sections[2::2]):
        name, _, body = section.partition("\n")
        change(files, kind, name.strip(), body.splitlines())
        told.append(f"{kind[0].replace('U', 'M')} {name.strip()}")
    for path, text in files.items():
        if text is None:
            os.remove(path)
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    return "\n".join(["Success. Updated the following files:", *told])


def change(files, kind, name, body):
    """Apply one section of a patch to files, {path: new text}; nothing is written yet."""
    path = full(name)
    if kind == "Add":
        files[path] = "".join(f"{line[1:]}\n" for line in body)
        return
    text = files.get(path) or text_of(path)
    if kind == "Delete":
        files[path] = None
    elif body and body[0].startswith("*** Move to: "):
        files[path] = None
        files[full(body[0].partition(": ")[2].strip())] = patched(text, body[1:], name)
    else:
        files[path] = patched(text, body, name)


def patched(text, body, name):
    """A text after the hunks of one section."""
    lines = text.splitlines()
    start = 0
    for anchor, hunk in hunks_of(body):
        if anchor:
            start = place_of(lines, [anchor], 0, name) + 1
        old = [line[1:] for line in hunk if line[:1] != "+"]
        new = [line[1:] for line in hunk if line[:1] != "-"]
        place = place_of(lines, old, start, name) if old else len(lines)
        lines[place : place + len(old)] = new
        start = place + len(new)
    return "".join(f"{line}\n" for line in lines)


def hunks_of(body):
    """[(the line after @@ or "", the hunk's lines)]"""
    hunks = []
    for line in body:
        if line.startswith("@@"):
            hunks.append((line[2:].strip(), []))
        elif line != "*** End of File":
            if not hunks:
                hunks.append(("", []))
            hunks[-1][1].append(line or " ")
    return hunks


def place_of(lines, old, start, name):
    """Where a run of lines begins at or after start; spaces at line ends, then at both ends, are let pass."""
    for clean in (str, str.rstrip, str.strip):
        wanted = [clean(line) for line in old]
        for place in [*range(start, len(lines)), *range(start)]:
            if [clean(line) for line in lines[place : place + len(old)]] == wanted:
                return place
    raise ValueError("Failed to find expected lines in " + "\n".join([f"{name}:", *old]))


@tool("Look at an image file.", path="string", detail="string")
def view_image(path, detail=None):
    raise ValueError("Images cannot be shown here.")


# Plans
@tool("Write down the plan of the work; at most one step is in progress.", explanation="string",
      plan={"type": "array", "items": STEP})  # fmt: skip
def update_plan(plan, explanation=""):
    return "Plan updated"


# What there is not in a sandbox without network, person or other agents
@tool("Search for tools that are not loaded yet.", query="string", limit="number")
def tool_search(query, limit=8):
    return "[]"


@tool("Ask the user.", questions={"type": "array", "items": {"type": "object"}})
def request_user_input(questions):
    raise ValueError("Nobody can answer in this session. Decide yourself.")


@tool("List the resources of MCP servers.", server="string", cursor="string")
def list_mcp_resources(server=None, cursor=None):
    return '{"resources": []}'


@tool("Read a resource of an MCP server.", server="string", uri="string")
def read_mcp_resource(server, uri):
    raise ValueError(f"unknown MCP server: {server}")


@tool("Start another agent.", message="string", items={"type": "array", "items": {"type": "object"}},
      agent_type="string", fork_context="boolean", model="string", reasoning_effort="string")  # fmt: skip
def spawn_agent(message="", **options):
    raise ValueError("There are no other agents in this sandbox. Do the task yourself.")
