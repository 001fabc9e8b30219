"""Fixtures of all tests: the stages as modules, a tiny GLM-4.5 tokenizer, real logs where a checkout has them."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: starts vLLM (about a minute each)")
    config.addinivalue_line("markers", "demo: runs recipes/demo/run.sh, the whole recipe (minutes)")


@pytest.fixture(scope="session")
def stage():
    """stage("03_sft") is the module."""
    return importlib.import_module


@pytest.fixture(scope="session")
def run_stage():
    """Run a stage as a user does: run_stage("02_format_trajectories.py", *flags) -> CompletedProcess with text."""

    def run(script, *flags, **kwargs):
        kwargs = {"cwd": ROOT, "timeout": 600} | kwargs
        return subprocess.run(
            [sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True, **kwargs
        )

    return run


@pytest.fixture(scope="session")
def one_line_error():
    """Assert that a run ended as a user's mistake must: exit code 2, one line on stderr, no traceback."""

    def check(result, *parts):
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert result.returncode == 2, (result.returncode, result.stderr)
        assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
        for part in parts:
            assert part in lines[0], lines[0]

    return check


@pytest.fixture(scope="session")
def make_model():
    """The demo's make_model.py as a module."""
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "recipes/demo/make_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shared():
    """Real logs and benchmark files beside a developer's checkout; a user's clone has none."""
    path = ROOT.parent / "shared" / "data"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    return path
