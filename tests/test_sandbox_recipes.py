"""recipes/sandbox: what 04 makes of each launcher's YAML. The commands were tried in podman; here they are read."""

import pytest
import yaml
from conftest import ROOT

RECIPES = sorted(ROOT.glob("recipes/sandbox/*.yaml"))


def command_of(stage, recipe, **more):
    module = stage("04_eval")
    settings = module.Settings(**yaml.safe_load(recipe.read_text()), **more)
    places = {"/workspace": "ws", "/opt/venv": "venv", "/private": "private", "/states": "states"}
    modes = {"/workspace": "rw", "/states": "rw"}
    mounts = [(f"/host/{name}", inside, modes.get(inside, "ro")) for inside, name in places.items()]
    words = module.own_command(settings, "limi-7", mounts, "/host/venv", "an-image", 3, "/workspace")
    return settings, words


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_launcher_gets_its_folders_environment_and_image(stage, recipe):
    settings, words = command_of(stage, recipe)
    assert words[0] == recipe.stem and words[-1] == "an-image"  # 04 appends python3 and its arguments
    assert not [word for word in words if "{" in word]
    option = "--bind=" if recipe.stem == "apptainer" else "--volume="
    assert {word.removeprefix(option) for word in words if word.startswith(option)} == {
        "/host/ws:/workspace:rw",
        "/host/private:/private:ro",
        "/host/states:/states:rw",
        "/host/venv:/opt/venv:ro",
    }
    assert "--env=HOME=/home/agent" in words and "--env=PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin" in words
    assert "--network=none" in words
    assert settings.sandbox_stop in (None, [recipe.stem, "kill", "{name}"])


@pytest.mark.parametrize("recipe", RECIPES[1:], ids=lambda path: path.stem)
def test_a_container_has_no_rights_and_its_limits(stage, recipe):
    _, words = command_of(stage, recipe)
    scratch, processes = stage("04_eval").SCRATCH, stage("04_eval").LIMITS["RLIMIT_NPROC"]
    for word in ("--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only", "--pull=never", "--rm"):
        assert word in words
    assert "--name=limi-7" in words and "--workdir=/workspace" in words and f"--pids-limit={processes}" in words
    assert f"--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777,size={scratch}" in words
    limit = next(word for word in words if word.startswith("--memory="))  # 04's own comes first, and is told
    assert int(limit.strip("--memory=g")) << 30 >= stage("04_eval").LIMITS["memory"] + 3 * scratch
    _, opened = command_of(stage, recipe, network=True)
    assert "--network=host" in opened
