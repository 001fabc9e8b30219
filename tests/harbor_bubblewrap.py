"""An environment of Harbor without Docker, for `harbor run --env harbor_bubblewrap:Bubblewrap`: bubblewrap
shows this machine's /usr, everything else is a folder. Of a Dockerfile it obeys COPY of a folder alone."""

import asyncio
import os
import shlex
import shutil
import tempfile
from pathlib import Path

from harbor.environments.base import BaseEnvironment, ExecResult

SANDBOX = "--unshare-all --die-with-parent --ro-bind /usr /usr --proc /proc --dev /dev"
SANDBOX += " --ro-bind /etc/alternatives /etc/alternatives"
FOLDERS = ("tmp", "workspace", "logs/agent", "logs/verifier", "logs/artifacts", "tests", "solution")


class Bubblewrap(BaseEnvironment):
    @staticmethod
    def type():
        return "bubblewrap"

    def _validate_definition(self):
        assert Path(self.environment_dir, "Dockerfile").exists()

    def place(self, path):
        return Path(self.root, str(path).lstrip("/"))

    async def start(self, force_build):
        self.root = tempfile.mkdtemp()
        for folder in FOLDERS:
            self.place(folder).mkdir(parents=True)
        for name in ("bin", "lib", "lib64"):
            self.place(name).symlink_to(f"usr/{name}")
        for line in Path(self.environment_dir, "Dockerfile").read_text().splitlines():
            if line.startswith("COPY"):
                _, source, target = line.split()
                await self.upload_dir(Path(self.environment_dir, source), target)

    async def stop(self, delete):
        shutil.rmtree(self.root)

    async def upload_file(self, source_path, target_path):
        self.place(target_path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source_path, self.place(target_path))

    async def upload_dir(self, source_dir, target_dir):
        shutil.copytree(source_dir, self.place(target_dir), symlinks=True, dirs_exist_ok=True)

    async def download_file(self, source_path, target_path):
        shutil.copy2(self.place(source_path), target_path)

    async def download_dir(self, source_dir, target_dir):
        shutil.copytree(self.place(source_dir), target_dir, symlinks=True, dirs_exist_ok=True)

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None):
        words = ["bwrap", "--bind", self.root, "/", *shlex.split(SANDBOX)]
        words += ["--chdir", cwd or "/workspace", "bash", "-c", command]
        variables = {"PATH": os.defpath, "HOME": "/tmp"}
        variables |= self._merge_env(env) or {}
        streams = {
            "stdout": asyncio.subprocess.PIPE,
            "stderr": asyncio.subprocess.PIPE,
        }
        process = await asyncio.create_subprocess_exec(
            *words,
            env=variables,
            **streams,
        )
        stdout, stderr = await asyncio.wait_for(process.communicate(), timeout_sec)
        return ExecResult(
            stdout=stdout.decode(),
            stderr=stderr.decode(),
            return_code=process.returncode,
        )
