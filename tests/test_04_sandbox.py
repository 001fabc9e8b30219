"""Stage 4: what a command, a check and a judged program cannot do."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from scripted import call, calls, last_line, raw, render, say, tool_outputs, verdicts, write_tasks

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")


@pytest.fixture(scope="module")
def m(stage):
    return stage("04_eval")


# --------------------------------------------------------------------------------------------------------------------
# The sandbox. Every test runs in bwrap as the user who runs the tests, and, where that is root, as an ordinary one
# too; and in docker, podman, apptainer where they are there: SANDBOX_IMAGE names an image with bash and python3

SANDBOX_SCRIPT = """
import asyncio, importlib, json, sys
sys.path.insert(0, sys.argv[1])
stage = importlib.import_module("04_eval")
request = json.load(sys.stdin)
stage.LIMITS |= request["limits"]
async def main():
    settings = stage.Settings(**request["settings"])
    _, program = stage.load_tools(None)
    await stage.try_sandbox(settings, program)
    told = []
    for commands in request["jobs"]:
        sandbox = stage.Sandbox(settings, program, request["workspace"], 0, {}, request["mounts"])
        sandbox.fill(None)
        replies = []
        for command in commands:
            name, arguments = ("check", {"command": command}) if isinstance(command, str) else command
            reply = await sandbox.call(name, arguments, 3)
            killed = f"KILLED {reply['killed']} " if reply["killed"] else ""
            replies.append(killed + (reply["output"] if "output" in reply else "ERROR " + reply["error"]))
        await sandbox.stop()
        told.append(replies)
    print(json.dumps(told))
asyncio.run(main())
"""


def container(name):
    """Settings for docker, podman, apptainer; skips where one of them cannot be tried."""
    image = os.environ.get("SANDBOX_IMAGE")
    if not shutil.which(name) or not image:
        pytest.skip(f"needs {name} and SANDBOX_IMAGE")
    return yaml.safe_load((ROOT / "recipes" / "sandbox" / f"{name}.yaml").read_text()) | {"image": image}


@pytest.fixture(params=["self", "ordinary", "docker", "podman", "apptainer"])
def sandboxed(request):
    """sandboxed(*commands) -> ["exit code\\noutput", ...], one sandbox for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        user = []
        choice = {}
        if request.param not in ("self", "ordinary"):
            choice = container(request.param)
        if request.param == "ordinary":
            if os.getuid() != 0:
                pytest.skip("already an ordinary user")
            user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
            shutil.copy(ROOT / "04_eval.py", folder)  # the clone may be readable by root only

        def run(*commands, jobs=None, network=False, workspace="ws", mounts=None, kill=None, **limits):
            script = folder if user else ROOT
            command = [*user, sys.executable, "-c", SANDBOX_SCRIPT, script]
            environment = {"PATH": os.environ["PATH"], "SECRET": "hunter2", "HOME": folder}
            environment |= {key: os.environ[key] for key in ("DOCKER_HOST",) if key in os.environ}
            job = {
                "jobs": jobs or [commands],
                "settings": {"network": network, "output_dir": folder} | choice,
                "limits": limits,
                "mounts": mounts or {},
                "workspace": f"{folder}/{workspace}",
            }
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            process = subprocess.Popen(command, text=True, env=environment, cwd=folder, **pipes)
            while kill and process.poll() is None:  # until kill() is true
                if job:
                    process.stdin.write(json.dumps(job))
                    process.stdin.close()
                    process.stdin = job = None
                if kill():
                    process.kill()
                time.sleep(0.05)
            output, error = process.communicate(json.dumps(job) if job else None, timeout=400)
            if user and "Permission denied" in error and process.returncode == 126:
                pytest.skip("an ordinary user may not run this Python")
            assert process.returncode == (-signal.SIGKILL if kill else 0), error
            told = json.loads(output or "[null]")
            return told if jobs else told[0]

        run.folder = Path(folder)
        run.choice = choice
        yield run


def test_no_network(sandboxed):
    class Quiet(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reach = f"timeout 5 bash -c 'echo > /dev/tcp/127.0.0.1/{server.server_port}'"
    closed = sandboxed(reach, "tail -n +3 /proc/net/dev", "timeout 5 bash -c 'echo > /dev/tcp/1.1.1.1/53'")
    opened = sandboxed(reach, network=True)
    server.shutdown()
    assert closed[0].startswith("1\n") and closed[2].startswith("1\n")
    assert [line.split(":")[0].strip() for line in closed[1].splitlines()[1:]] == ["lo"]
    assert opened == ["0\n"]  # so the test above can fail


def test_no_host_files_environment_or_processes(sandboxed):
    secret = sandboxed.folder / "secret"
    secret.write_text("hunter2")
    sandboxed.folder.joinpath("ws").mkdir(mode=0o777)
    replies = sandboxed(
        f"cat {secret} /root/.bashrc /etc/shadow /etc/passwd; ls /root/.ssh /home/agent/..",
        "env; cat /proc/*/environ | tr '\\0' '\\n'",
        "ls -d /proc/[0-9]* | wc -l; kill -0 " + str(os.getpid()),
        "touch /usr/x; touch /etc/x; touch /x; touch /dev/x; touch /opt/x; mount -t tmpfs none /mnt; echo $?",
        "unshare -Ur true; ln /usr/bin/env hard; id -u; cat /proc/self/status | grep CapEff",
        f"ln -s {secret} link; cat link; cat ../../..{secret}; ln -s /etc/shadow shadow; cat shadow",
        "for p in /proc/[0-9]*; do for f in 0 1 2; do [ $p = /proc/$$ ] || readlink $p/fd/$f; done; done",
        "cat /proc/*/cmdline | tr '\\0' ' '; ls /proc/*/fd/ -l",
    )
    assert "hunter2" not in "".join(replies) and "SECRET" not in "".join(replies)
    assert "root:" not in replies[0] or sandboxed.choice  # a container shows its image's own /etc/passwd
    visible, dead = replies[2].splitlines()[1:3]
    assert int(visible) <= 6 and "No such process" in dead
    assert len(re.findall("Read-only file system|'/dev/x': Permission denied", replies[3])) == 5
    assert "mount: " in replies[3] and "hard" in replies[4]
    # podman lets a command make a user namespace; the next test shows that it opens nothing
    assert "unshare: " in replies[4] or "podman" in str(sandboxed.choice)
    assert re.search(r"^(1000|100000|%d)\nCapEff:\t0+$" % (os.getuid() or 1000), replies[4], re.MULTILINE)
    assert str(sandboxed.folder) not in replies[6] + replies[7]  # no descriptor, no argument that names a host's path


def test_what_a_command_cannot_take_down(m, sandboxed):
    swarm = "for i in 1 2 3; do python3 -c 'import time; x = b\"1\" * (1 << 28); time.sleep(1)' & done; wait"
    replies = sandboxed(
        ":(){ :|:& };: ; sleep 2.5", "echo 1",
        "python3 -c 'x = bytearray(20 << 30)'", "echo 2",
        "kill -9 -1", "echo 3",
        "sleep 1000 & disown; echo left behind",
        "yes",
        "head -c 2G /dev/zero > big; stat -c %s big; rm big",
        "python3 -c 'import time, os, signal; signal.signal(15, signal.SIG_IGN); time.sleep(99)'", "echo 4",
        swarm, "echo 5",
        memory=300 << 20, RLIMIT_FSIZE=10 << 20,
    )  # fmt: skip
    gone = "ERROR The sandbox stopped responding and was started again; files are kept, processes are not."
    bomb = "KILLED processes ERROR a command started too many processes; everything was ended, files are kept"
    assert replies[0] == bomb and replies[1] == "0\n1"
    assert "MemoryError" in replies[2] and replies[3] == "0\n2"
    assert replies[4] == gone and replies[5] == "0\n3"
    assert replies[6] == "0\nleft behind"
    assert replies[7].startswith("124\ny\ny\n") and len(replies[7]) < 33_000
    assert int(replies[8].split("\n")[-1]) == 10 << 20
    assert replies[9] == "124\n" and replies[10] == "0\n4"
    assert replies[11].startswith("KILLED memory ") and replies[12] == "0\n5"


def test_a_disk_that_is_nearly_full_stops_commands(sandboxed):
    """All that fill it; one that fills nothing has the time to make room."""
    free = shutil.disk_usage(sandboxed.folder).free
    commands = ("fallocate -l 1G big && sleep 60; echo went on", "sleep 1; rm -f big; echo short")
    reply, after = sandboxed(*commands, reserve=free - (300 << 20))
    assert reply == "KILLED disk -9\n" and after.endswith("0\nshort")


def test_a_disk_that_takes_no_more_files_stops_commands(sandboxed):
    files = os.statvfs(sandboxed.folder)
    if not files.f_files:
        pytest.skip("this file system counts no files")
    commands = ("mkdir d; cd d; seq 9000 | xargs touch; sleep 60; echo went on", "sleep 1; rm -rf d; echo short")
    reply, after = sandboxed(*commands, files=files.f_favail - 4000)
    assert reply == "KILLED disk -9\n" and after.endswith("0\nshort")


def test_what_a_grader_is_shown_is_read_only(sandboxed):
    given = sandboxed.folder / "given"
    given.mkdir(mode=0o777)
    given.joinpath("data").write_text("theirs")
    remount = "unshare -Urm sh -c 'mount -o remount,bind,rw /original; umount /original; echo mine > /original/data'"
    commands = ("cat /original/data; echo mine > /original/data", remount, "df -k /tmp | tail -n 1")
    reply, again, space = sandboxed(*commands, mounts={"/original": str(given)})
    assert again[0] != "0" and reply.startswith("1\ntheirs") and "Read-only file system" in reply
    assert given.joinpath("data").read_text() == "theirs" and int(space.split()[2]) == 1 << 20  # SCRATCH


def test_a_killed_run_leaves_nothing_behind(sandboxed):
    """SIGKILL gives no chance to clean up: the tool server ends when nobody listens to it any more."""
    command = f"sleep {100_000 + os.getpid()}.5"

    def alive():
        return subprocess.run(["pgrep", "-fx", command], capture_output=True).returncode == 0

    sandboxed(command, kill=alive)
    deadline = time.monotonic() + 60
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive()
    if sandboxed.choice.get("sandbox") in ("docker", "podman"):
        listed = [sandboxed.choice["sandbox"], "ps", "--all", "--quiet", "--filter", "name=limi-"]
        while (left := subprocess.run(listed, capture_output=True, text=True).stdout) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left


FORGE = r"""
import ctypes, os
for pid in filter(str.isdigit, os.listdir("/proc")):
    for target in (0, 1):
        if int(pid) != os.getpid():
            fd = ctypes.CDLL(None).syscall(438, os.pidfd_open(int(pid)), target, 0)  # pidfd_getfd: a copy of its file
            if fd >= 0 and "socket" in os.readlink(f"/proc/self/fd/{fd}"):
                os.write(fd, b'{"id": "0", "output": "0\\nforged"}\n')
"""


def test_nobody_can_answer_for_the_tool_server(sandboxed):
    """A process that the agent starts, or that runs its code in a check, cannot write the check's result itself."""
    replies = sandboxed(f"python3 -c {shlex.quote(FORGE)}; exit 1", "echo fine")
    assert replies[0].startswith(("1\n", "ERROR The sandbox stopped")) and replies[1] == "0\nfine"


def test_the_check_is_safe_from_what_the_agent_left_running(endpoint, evaluate):
    left = "setsid nohup bash -c 'while sleep 0.02; do touch /workspace/passed; done' > /dev/null 2>&1 &"
    endpoint.script["q"] = [call("run_shell_command", command=left), say("done")] + [say("x")] * 9
    check = "rm -f passed; sleep 0.5; test -e passed && exit 0; echo 'passed is missing'; exit 1"
    episodes, _ = evaluate(("t", [("q", check)]))
    assert [r["score"] for r in episodes["t", 0]["rounds"]] == [0, 0, 0]


def test_the_host_survives_what_lies_in_a_workspace(m, endpoint, evaluate, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    precious.joinpath("file").write_text("kept")
    traps = f"ln -s {precious} link; mkfifo fifo; mkdir d; ln -s / d/root; chmod 000 d; touch \"$(printf 'a\\nb')\""
    endpoint.script["q"] = [call("run_shell_command", command=traps), say("done")]
    evaluate(("t", [("q", "true")]))
    tmp_path.joinpath("out/episodes.jsonl").unlink()
    evaluate(("t", [("q", "true")]))  # the folder is removed and made anew
    assert precious.joinpath("file").read_text() == "kept"


def test_a_sandbox_that_does_not_start_is_no_score(endpoint, tmp_path, run_stage, one_line_error):
    fake = tmp_path / "bin"
    fake.mkdir()
    fake.joinpath("bwrap").write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2; exit 1\n")
    fake.joinpath("bwrap").chmod(0o755)
    flags = ["--base_url", endpoint.url, "--model", "x", "--tasks", write_tasks(tmp_path, ("t", [("q", "true")]))]
    for path, text in ((f"{fake}:/usr/bin:/bin", "uid map: Permission denied"), (str(tmp_path), "bwrap, which is not installed")):
        result = run_stage("04_eval.py", *flags, "--output_dir", tmp_path / "o", env=os.environ | {"PATH": path})
        one_line_error(result, text)
    assert not tmp_path.joinpath("o/summary.json").exists()




# --------------------------------------------------------------------------------------------------------------------
# Attacks, each with what must stand in the output; as root and as an ordinary user

DEEP = """import os
for _ in range(1100):
    os.mkdir("d")
    os.chdir("d")
"""
TRACE = """python3 - <<'END'
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
held = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid not in (os.getpid(), os.getppid())]
attached = [pid for pid in held if libc.ptrace(16, pid, 0, 0) == 0 and open(f"/proc/{pid}/comm").read() != "sleep\\n"]
opened = []
for pid in held:
    try:
        opened.append(open(f"/proc/{pid}/mem", "rb"))
    except OSError:
        pass
print("attached", attached, "opened", len(opened))
END"""
STEAL = """python3 - <<'END'
import ctypes, os
stolen = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    for number in range(8):
        if int(pid) != os.getpid():
            try:
                handle = os.pidfd_open(int(pid))
            except OSError:
                continue
            fd = ctypes.CDLL(None).syscall(438, handle, number, 0)  # pidfd_getfd
            if fd >= 0 and "socket" in os.readlink(f"/proc/self/fd/{fd}"):
                stolen.append(pid)
print("stolen", stolen)
END"""
MEMFD = """python3 - <<'END'
import os
fd = os.memfd_create("x")
for _ in range(1000):
    os.write(fd, bytes(1 << 20))
print("held it all")
END"""
SEGMENT = """python3 - <<'END'
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
for _ in range(10):
    at = libc.shmat(libc.shmget(0, 100 << 20, 0o1777), None, 0)
    ctypes.memset(at, 1, 100 << 20)
    libc.shmdt(ctypes.c_void_p(at))
import time
time.sleep(2)
print("held it all")
END"""
BLIND = "prlimit --pid $PPID --nofile=3:3; sleep 1\n" + MEMFD  # the guard can open nothing in /proc any more
LEAVE = """python3 - <<'END'
import ctypes
libc = ctypes.CDLL(None)
key = libc.syscall(248, b"user", b"mark", b"answer", 6, -4)  # add_key, into the user's keyring
queue = libc.msgget(4711, 0o1666)
for path in ("/dev/shm/mark", "/tmp/mark", "/home/agent/mark"):
    open(path, "w")
print("left", key > 0, queue >= 0)
END"""
FIND = """python3 - <<'END'
import ctypes, os
libc = ctypes.CDLL(None)
paths = [path for path in ("/dev/shm/mark", "/tmp/mark", "/home/agent/mark") if os.path.exists(path)]
print("found", libc.syscall(250, 10, -4, b"user", b"mark", 0) > 0, libc.msgget(4711, 0) >= 0, paths)
END"""
CALLS = """python3 - <<'END'
import ctypes
libc = ctypes.CDLL(None)
handle = ctypes.create_string_buffer(b"\\x08\\0\\0\\0\\x01\\0\\0\\0" + bytes(8))
calls = {"unshare": (272, 0x10000000), "clone3": (435, 0, 0), "setns": (308, 0, 0)}
calls |= {"pivot_root": (155, b"/", b"/")}
calls |= {"bpf": (321, 0, 0, 0), "init_module": (175, 0, 0, b""), "open_by_handle_at": (304, 0, handle, 0)}
calls |= {"swapon": (167, b"/x", 0), "settimeofday": (164, 0, 0), "acct": (163, b"/workspace/a")}
print("allowed", [name for name, (number, *given) in calls.items() if libc.syscall(number, *given) >= 0])
END"""
ECHO = ("run_shell_command", {"command": "echo on"})
DAEMON = "import os, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(99)"
ATTACKS = {  # what -> (commands, what the last output must match)
    "trace the tool server or the launcher": ([TRACE], r"attached \[\] opened 0"),
    "steal the socket to the host": ([STEAL], r"stolen \[\]"),
    "write into another process's memory": (["echo x > /proc/1/mem; echo $?"], "Permission denied|No such file"),
    "read the launcher's descriptors": (["ls -l /proc/1/fd 2>&1; ls -l /proc/$PPID/fd"], "Permission denied"),
    "stop the tool server": (["kill -STOP $PPID; sleep .2; echo stopped", "echo on"], "on$|ERROR The sandbox stopped"),
    "kill the tool server": (["kill -9 $PPID; sleep 1", "echo on"], "0\non$"),
    "kill everything": (["kill -9 -1", "echo on"], "0\non$"),
    "a fork bomb": ([":(){ :|:& };:; sleep 2.5", "echo on"], "0\non$"),
    "files in memory": ([MEMFD], "^KILLED memory"),
    "segments in memory": ([SEGMENT], "^KILLED memory"),
    "a large allocation": (["python3 -c 'x = bytearray(20 << 30)'"], "MemoryError"),
    "fill /dev/shm": (["fallocate -l 2G /dev/shm/x; fallocate -l 1G /dev/shm/y && fallocate -l 1G /dev/shm/z"], "No space|too large"),
    "fill /tmp": (["for i in 1 2 3; do fallocate -l 900M /tmp/$i; done"], "No space"),
    "a namespace of its own": (["unshare -Urm true"], "unshare: "),
    "mount": (["mount -t tmpfs none /mnt; mount --bind /usr /tmp"], r"mount: [\s\S]*mount: "),
    "become root": (["su -c id; sudo id; id -u"], r"\n(1000|\d{6})$"),
    "a set-uid program": (["cp /bin/bash b; chmod u+s b; ./b -p -c 'id -u'"], r"\n?(1000|\d{6})$"),
    "a device": (["mknod d b 8 0; echo $?"], "Operation not permitted"),
    "a raw disk": (["ls /dev/vda /dev/sda /dev/mem 2>&1 | grep -vc 'No such'"], r"\n0$"),
    "the kernel's switches": (["echo 1 > /proc/sys/kernel/panic; echo h > /proc/sysrq-trigger"], "Permission|Read-only"),
    "the host's name": (["hostname evil; hostname"], "sandbox$"),
    "another root": (["chroot /usr true"], "chroot: "),
    "a program into /usr": (["cp /bin/true /usr/bin/x; cp /bin/true /usr/local/bin/python3"], "Read-only.*\n.*Read-only"),
    "the host's users": (["cat /etc/passwd /etc/shadow; cat /etc/hosts"], r"(No such file[\s\S]*){2}127.0.0.1 localhost sandbox$"),
    "the host's homes": (["ls /root /home/ubuntu /home/agent/.ssh"], r"(No such file[\s\S]*){3}"),
    "the environment of others": (["cat /proc/*/environ | tr '\\0' '\\n' | grep -c SECRET"], r"\n0$"),
    "the repository": (["ls -d /work /repo /workspace/.. && ls /workspace/.."], "^(?!.*04_eval)"),
    "the packages that serve and train": (["python3 -c 'import torch'; python3 -c 'import vllm'"], "(No module named.*\n?[^\0]*){2}"),
    "the clock": (["date -s 2001-01-01; date +%Y"], "Operation not permitted"),
    "priority": (["nice -n -5 true; echo $?"], "Permission denied|cannot set niceness"),
    "a higher limit": (["ulimit -u 99999; ulimit -d unlimited"], "Operation not permitted"),
    "a core": (["ulimit -c unlimited; bash -c 'kill -SEGV $$'; ls core* | wc -l"], r"\n0$"),
    "keep a process": (["setsid nohup sleep 999 > /dev/null 2>&1 & echo kept"], "kept"),
    "ignore every signal": (["trap '' TERM INT HUP; sleep 99"], "^124"),
    "print without end": (["yes"], r"^(124|-25)\n(y\n){100}"),
    "an output of one line": (["head -c 30M /dev/zero | tr '\\0' a"], "characters left out"),
    "a pipe that nobody writes to": (["mkfifo f", ("read_file", {"absolute_path": "/workspace/f"})], "ERROR ValueError: Not a regular"),
    "a device as a file": ([("read_file", {"absolute_path": "/dev/zero"})], "ERROR ValueError: Not a regular"),
    "a search over a pipe": (["mkfifo f", ("search_file_content", {"pattern": "x"})], "Found 0 match"),
    "a pattern that never ends": (["printf 'a%.0s' {1..60} > a", ("search_file_content", {"pattern": "(a+)+$b"})], "ERROR TimeoutError"),
    "folders without end": ([
        f"python3 -c {shlex.quote(DEEP)}",
        ("glob", {"pattern": "**/x"}),
    ], "Found 0 file"),
    "replace in a pipe": (["mkfifo f", ("replace", {"file_path": "/workspace/f", "old_string": "a", "new_string": "b"})], "ERROR ValueError: Not a regular"),
    "blind the guard": ([BLIND], "^ERROR The sandbox stopped"),
    "no time for the tool server": (["prlimit --pid $PPID --cpu=1:1; echo done", "echo on"], "0\non$"),
    "no processes for the tool server": (["prlimit --pid $PPID --nproc=0:0", "echo on", "echo on"], "0\non$"),
    "the tool server's own alarm": (["kill -ALRM $PPID; sleep 1", "echo on"], "0\non$"),
    "every signal to the tool server": (
        ["for s in HUP INT QUIT USR1 ALRM TERM XCPU; do kill -$s $PPID; done; sleep 1", "echo on", "echo on"],
        "0\non$",
    ),
    "stop itself": (["kill -STOP $$", "echo on"], "0\non$"),
    "lock /tmp": (["chmod 000 /tmp", ECHO], "Stdout: on"),
    "fill /tmp, then talk": (["head -c 2G /dev/zero > /tmp/x", ECHO], "Stdout: on"),
    "fill the home": (["for i in 1 2 3; do fallocate -l 900M ~/$i; done"], "No space"),
    "the host's abstract sockets": (["grep -c @ /proc/net/unix"], r"\n0$"),
    "leave something": ([LEAVE], "left True True"),
    "find what was left": ([FIND], r"found False False \[\]$"),
    "calls of the kernel for root": ([CALLS], r"allowed \[\]$"),
    "a file that cannot be removed": (["touch f; chattr +i f"], "not permitted|not supported"),
    "a program with a capability": (
        ["cp /bin/cat c; /usr/sbin/setcap cap_dac_override+ep c; ./c /proc/1/environ"],
        "c: /proc/1/environ: Permission denied",
    ),
    "mount over the folder": (["mount --bind /tmp /workspace; umount -l /proc"], r"mount: [\s\S]*umount: "),
    "another folder in its place": (["rmdir /workspace; mv /workspace /w; ls -d /w"], "cannot access '/w'"),
    "the root of another process": (
        ["ls /proc/1/root/ /proc/1/cwd/ /proc/$PPID/root/"],
        "(Permission denied[^\0]*){3}",
    ),
    "control groups": (["ls /sys/fs/cgroup"], "No such file"),
    "the kernel's log": (["dmesg; cat /proc/kmsg"], "not permitted[^\0]*(denied|not permitted)"),
    "type for the user": (
        ["python3 -c 'import fcntl; fcntl.ioctl(0, 0x5412, b\"x\")'; echo > /dev/tty"],
        "Inappropriate[^\0]*No such device",
    ),
    "be the last one to be killed": (["echo -1000 > /proc/self/oom_score_adj"], "Permission denied"),
    "other users' numbers": (["echo 0 0 1 > /proc/self/uid_map"], "not permitted|Permission denied"),
    "a child that nobody waits for": ([f"python3 -c '{DAEMON}'; echo on"], "0\non$"),
    "write into a pipe": (["mkfifo f", ("write_file", {"file_path": "/workspace/f", "content": "b"})], "ERROR ValueError: Not a regular"),
}  # fmt: skip


def test_attacks_that_are_held(sandboxed):
    told = sandboxed(jobs=[commands for commands, _ in ATTACKS.values()], memory=350 << 20)
    held = {}
    for (what, (_, expected)), replies in zip(ATTACKS.items(), told):
        held[what] = True if re.search(expected, replies[-1]) else [reply[:300] for reply in replies]
    assert held == dict.fromkeys(ATTACKS, True)


# What an agent may leave in its folder: it is graded all the same, and its state is kept
LEFT = {
    "names that are options": "touch -- -rf --help --checkpoint=1 '--checkpoint-action=exec=touch pwned'",
    "names of bytes": r"touch $'a\nb' $'c\xff' \"$(printf 'n%.0s' {1..255})\"",
    "many files that are holes": "for i in $(seq 40); do truncate -s 1000M h$i; done",
    "a pipe and a socket": "mkfifo p; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"s\")'",
    "links to everywhere": "ln -s / r; ln -s l l; ln -s /private p; ln -s ../../etc/shadow u; ln -s /proc q",
    "a repository with hooks": "mkdir -p .git/hooks; echo 'touch pwned' > .git/hooks/pre-commit",
}


def test_what_an_agent_leaves_harms_neither_its_state_nor_its_grade(endpoint, evaluate):
    tasks = []
    for number, command in enumerate(LEFT.values()):
        left = call("run_shell_command", command=f"{command}; echo fine > a")
        endpoint.script[f"q{number}"] = [left, say("done")]
        tasks.append((f"t{number}", [(f"q{number}", "grep fine a && test ! -e pwned")]))
    episodes, summary = evaluate(*tasks)
    solved = {what: episodes[f"t{number}", 0]["meta"]["solved"] for number, what in enumerate(LEFT)}
    assert solved == dict.fromkeys(LEFT, True) and not summary["not_run"]
    assert summary["metrics"]["states_not_kept"] == 0


# What the agent's program may do while a check runs it: the outcome has a name, and is never a pass
IN_A_CHECK = {
    "kill the tool server": ("kill -9 $(ps -o ppid= $PPID)", "killed"),
    "wake its alarm": ("kill -ALRM $(ps -o ppid= $PPID)", "killed"),
    "blind its guard": ("prlimit --pid $(ps -o ppid= $PPID) --nofile=3:3", "killed"),
    "kill the check": ("kill -9 $PPID", 0),
    "kill all": ("kill -9 -1", "killed"),
    "print without end": ("yes", 0),
    "close the check's output": ("exec 1>&- 2>&-", 0),
}


def test_what_a_checked_program_does_to_its_check_is_never_a_pass(endpoint, evaluate):
    tasks = []
    for number, (command, _) in enumerate(IN_A_CHECK.values()):
        script = f"echo {shlex.quote(command + '; sleep 2')} > run.sh"
        endpoint.script[f"q{number}"] = [call("run_shell_command", command=script), say("done")]
        tasks.append((f"t{number}", [(f"q{number}", "bash run.sh; sleep 2; test -e done")]))
    episodes, _ = evaluate(*tasks, rounds=1, check_seconds=8)
    outcomes = {key[0]: row["rounds"][0]["score"] for key, row in episodes.items()}
    lines = (endpoint.folder / "out/not_run.jsonl").read_text().splitlines()
    outcomes |= {row["query_id"]: row["reason"] for row in map(json.loads, lines)}
    told = {what: outcomes[f"t{number}"] for number, what in enumerate(IN_A_CHECK)}
    assert told == {what: outcome for what, (_, outcome) in IN_A_CHECK.items()}


PLANTED = ("json", "sys", "os", "sitecustomize", "usercustomize", "ctypes", "resource", "stat", "threading", "fnmatch")


def test_a_planted_module_answers_for_nobody(endpoint, evaluate):
    """Whatever the agent leaves in its folder is not imported by what runs its check."""
    forged = "import sys\\nfor line in sys.stdin: print('{}', flush=True)\\n"
    plant = "; ".join(f"printf \"{forged}\" > {name}.py" for name in PLANTED)
    endpoint.script["q"] = [call("run_shell_command", command=plant), *[say("done")] * 3]
    episodes, _ = evaluate(("t", [("q", "echo 'not ok - never passes'; false")]))
    checks = [{"requirement": "never passes", "passed": False}]
    assert [record["checks"] for record in episodes["t", 0]["rounds"]] == [checks] * 3


HELPERS = """argparse array ast asyncio base64 bisect calendar cmath code codecs collections contextlib copy csv ctypes
datetime decimal enum fnmatch functools glob hashlib heapq io json keyword linecache math numbers operator os pickle
platform queue random re reprlib resource secrets select selectors signal socket stat statistics string struct
subprocess tempfile textwrap threading time token tokenize traceback types typing uuid warnings""".split()


def test_an_innocent_file_name_costs_nothing(endpoint, evaluate):
    """An honest helper called random.py, types.py, math.py stands in the way of none of our programs."""
    make = "; ".join(f"echo 'def help(): pass' > {name}.py" for name in HELPERS)
    endpoint.script["q"] = [
        call("run_shell_command", command=make),
        call("list_directory", path="/workspace"),
        say("done"),
    ]
    episodes, _ = evaluate(("t", [("q", "test $(ls *.py | wc -l) = %d" % len(HELPERS))]))
    assert episodes["t", 0]["meta"]["solved"] and "random.py" in tool_outputs(episodes["t", 0])[1]


def test_planted_settings_do_not_run_with_the_check(endpoint, evaluate):
    """A check calls bash and python3 from the system, with a home folder, an environment and a PATH of its own."""
    plant = """mkdir -p bin .git/hooks ~/bin; printf '#!/bin/sh\\nexit 0\\n' > python3; chmod +x python3
    cp python3 grep; cp python3 bin/python3; cp python3 ~/bin/grep; cp python3 .git/hooks/post-checkout
    for f in .bashrc .bash_profile .profile .bash_env sitecustomize.py conftest.py; do echo 'exit 0' > $f; done
    cp .bashrc ~; export BASH_ENV=/workspace/.bash_env LD_PRELOAD=/workspace/evil.so; echo planted"""
    endpoint.script["q"] = [call("run_shell_command", command=plant), *[say("done")] * 3]
    check = "set -e; test -z \"$BASH_ENV$LD_PRELOAD\"; ! ls ~/bin; python3 -I -c 'import sys; sys.exit(3)'"
    episodes, _ = evaluate(("t", [("q", check)]))
    assert [record["score"] for record in episodes["t", 0]["rounds"]] == [0, 0, 0]


def test_the_check_works_on_a_copy(endpoint, evaluate, tmp_path):
    endpoint.script["q"] = [call("run_shell_command", command="echo mine > a"), say("done"), say("done")]
    evaluate(("t", [("q", "echo spoilt > a; false")]), rounds=2)
    assert (tmp_path / "out/workspaces/t-0/a").read_text() == "mine\n"
    assert os.listdir(tmp_path / "out/workspaces") == ["t-0"]


def test_a_check_that_our_own_guard_ends_is_no_score(endpoint, evaluate, m, monkeypatch):
    monkeypatch.setitem(m.LIMITS, "memory", 200 << 20)
    endpoint.script["q"] = [say("done")] * 3
    swarm = "python3 -c 'import time; x = b\"1\" * (1 << 29); time.sleep(9)'"
    _, summary = evaluate(("t", [("q", swarm)]), ("u", [("q", ":(){ :|:& };:; sleep 9")]))
    assert summary["not_run"] == {"killed": 2} and not summary["by_task"]


def test_a_thousand_folders_in_each_other_end_nothing(endpoint, evaluate, m):
    deep = f"python3 -c {shlex.quote(DEEP)}; echo fine > a"
    endpoint.script["q"] = [call("run_shell_command", command=deep), say("done")]
    try:
        for _ in range(2):  # once more in the same folder: it is removed and made anew
            (endpoint.folder / "out/episodes.jsonl").unlink(missing_ok=True)
            episodes, _ = evaluate(("t", [("q", "grep fine a")]))
            assert episodes["t", 0]["meta"]["solved"]
    finally:
        m.remove(endpoint.folder / "out")  # pytest's own way of removing folders goes down a thousand calls


def test_the_venv_of_a_task_is_the_agents_and_the_checks_python(endpoint, evaluate, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    packages = next(tmp_path.glob("env/lib/python3*/site-packages"))
    packages.joinpath("heron.py").write_text("print('a bird')")
    endpoint.script["q"] = [
        call("run_shell_command", command="python3 -c 'import heron, sys; print(sys.prefix)'"),
        say("done"),
    ]
    check = "/opt/venv/bin/python -I -c 'import heron' && ! touch /opt/venv/x && test -z \"$VIRTUAL_ENV\""
    task = {"query_id": "t", "venv": "env", "turns": [{"query": "q", "check": check}]}
    episodes, _ = evaluate(task)
    assert "Stdout: a bird\n/opt/venv\n" in tool_outputs(episodes["t", 0])[0] and episodes["t", 0]["meta"]["solved"]
