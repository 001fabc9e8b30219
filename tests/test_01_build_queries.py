"""Stage 1 on the demo's history, on small histories made here, and against a scripted endpoint."""

import base64
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Process
from pathlib import Path
from unittest import mock

import pytest

stage = importlib.import_module("01_build_queries")
ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="verify needs bubblewrap")
# A test's environment is made without network: pytest and what it needs are copied out of this one.
SITE = Path(site.getsitepackages()[0])
NAMES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py")
PACKAGES = [str(SITE / name) for name in NAMES if (SITE / name).exists()]
OFFLINE = (
    f"{sys.executable} -m venv --without-pip $ENVIRONMENT && "
    f"cp -r {' '.join(PACKAGES)} $ENVIRONMENT/lib/python3.{sys.version_info.minor}/site-packages/"
)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")


def command(*args):
    return [sys.executable, str(ROOT / "01_build_queries.py"), *map(str, args)]


def run(*args):
    """What the stage prints with these flags, in this process; raises InputError."""
    output = io.StringIO()
    with mock.patch.object(sys, "argv", command(*args)[1:]), contextlib.redirect_stdout(output):
        try:
            stage.main(*stage.parse_settings(stage.TrlParser(stage.Settings)))
        except SystemExit as end:
            assert not end.code
    return output.getvalue()


def refused(*args):
    """The message to a user whose flags or files are wrong."""
    with pytest.raises(stage.InputError) as error:
        run(*args)
    return str(error.value)


def test_a_mistake_is_told_in_one_line(tmp_path):
    for flags in (("--repos", tmp_path / "nowhere"), ("--real", tmp_path / "nowhere"), ("--reel", "x"), ()):
        done = subprocess.run(
            command(*flags, "--output_file", tmp_path / "out" / "queries.jsonl"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("01_build_queries.py: ")
    assert not list(tmp_path.rglob("*.jsonl"))


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def git(folder, *args, stdin=None, author="Ada"):
    identity = {}
    for who in ("AUTHOR", "COMMITTER"):
        identity |= {f"GIT_{who}_NAME": author, f"GIT_{who}_EMAIL": "ada@example.invalid"}
    return subprocess.run(
        ["git", "-C", str(folder), *args],
        check=True,
        capture_output=True,
        text=True,
        stdin=stdin,
        env=os.environ | identity | {"GIT_CONFIG_GLOBAL": os.devnull},
    ).stdout


@pytest.fixture
def demo_clone(tmp_path):
    clone = tmp_path / "pr_repo.git"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(clone)], check=True)
    with open(FIXTURES / "pr_repo.fastexport") as file:
        git(clone, "fast-import", "--quiet", stdin=file)
    return clone


LICENCE = "MIT\nPermission is hereby granted, free\nof charge"


@pytest.fixture
def small_repo(tmp_path):
    """A repository with a licence, one module and its test; commit(files, message) adds to it."""
    repo = tmp_path / "small"
    repo.mkdir()
    git(repo, "init", "-q", "-b", "main")

    def commit(files, message, author="Ada"):
        for name, text in files.items():
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            (repo / name).write_text(text)
        git(repo, "add", "-A")
        git(repo, "commit", "-q", "-m", message, author=author)

    commit({"LICENSE": LICENCE, "a.py": "x = 1\n", "test_a.py": "import a\n"}, "start")
    return repo, commit


def mined(*repos, **settings):
    return stage.mine(stage.Settings(repos=list(map(str, repos)), **settings), None, [])


# ---- mine ----


def test_the_demos_history_says_why_each_pull_request_is_no_task(demo_clone):
    assert {row["meta"]["number"]: row["reasons"] for row in mined(demo_clone)} == {
        1: ["code file added, deleted or renamed"],
        2: ["no code file changed"],
        3: [],
        4: ["made by a bot"],
        5: [],
        6: ["reverted later"],
        7: ["a revert"],
        8: ["only comments, docstrings or layout changed"],
        9: ["more than one code file changed"],
        10: [],
        11: ["the number of an issue: no such refs/pull"],
    }


def test_mined_diff_equals_the_diff_of_the_pull_requests_own_branch(demo_clone):
    pulls = list(stage.pull_requests(str(demo_clone)))
    assert [(pull["number"], pull["shape"]) for pull in pulls] == [
        (11, "squash"),
        (10, "merge commit"),
        (9, "squash"),
        (8, "merge commit"),
        (7, "squash"),
        (6, "squash"),
        (5, "squash"),
        (4, "merge commit"),
        (3, "two parents"),
        (2, "squash"),
        (1, "merge commit"),
    ]
    assert pulls[8]["title"] == "Parse durations of several units"
    assert pulls[1]["title"] == "Compile the slug pattern once"
    for pull in pulls[1:]:
        own = git(demo_clone, "diff", "--full-index", f"{pull['base']}...refs/pull/{pull['number']}/head")
        assert "".join(pull["files"].values()).strip() == own.strip()


def test_the_users_git_settings_change_nothing(demo_clone, monkeypatch, tmp_path):
    plain = list(stage.pull_requests(str(demo_clone)))
    (tmp_path / ".gitconfig").write_text(
        "[diff]\nsuppressBlankEmpty = true\nmnemonicPrefix = true\n"
        "interHunkContext = 9\n[core]\nabbrev = 4\n[log]\nshowSignature = true\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert list(stage.pull_requests(str(demo_clone))) == plain


@pytest.mark.parametrize(
    "files, message, reason",
    [
        ({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)", None),
        ({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7) (closes #3)", None),
        ({"a.py": "x = 2\n", "tests/regression.py": "# 2\n"}, "Two (#7)", None),
        ({"a.js": "x = 2\n", "test/x/test.js": "// 2\n"}, "Two (#7)", "code file added, deleted or renamed"),
        (
            {"a.py": '"""Doc."""\nx = 1  # one\n', "test_a.py": "# 2\n"},
            "Say (#7)",
            "only comments, docstrings or layout changed",
        ),
        ({"a.py": "x = (\n", "test_a.py": "# 2\n"}, "Two (#7)", "code file is not Python 3"),
        ({"a.py": "x = 2\n" * 2000, "test_a.py": "# 2\n"}, "Two (#7)", "diff longer than 2000 tokens"),
        ({"b.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)", "code file added, deleted or renamed"),
        ({"b.java": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)", "no runner for *.java"),
        ({"vendor/a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)", "no code file changed"),
        ({"a.py": "x = 2\n"}, "Two (#7)", "no test file changed"),
        ({"a.py": "x = 2\n", "tests/fixtures/a.py": "# 2\n"}, "Two (#7)", "no test file changed"),
        ({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Revert two (#7)", "a revert"),
        ({"a.py": "x = 2\n", "test_a.py": f"assert {'-' * 5000}1\n"}, "Deep (#7)", None),
        ({"a.py": "x = 2\n\0", "test_a.py": "# 2\n"}, "Zero (#7)", "code file is not Python 3"),
        (
            {"src/lib.rs": "pub fn x() {}\n#[cfg(test)]\nmod tests {\n    #[test]\n    fn t() {}\n}\n"},
            "Inside (#7)",
            "its tests stand in the code file itself",
        ),
        ({"a.py": "\ufeffx = 2\n", "test_a.py": "# 2\n"}, "Two (#7)", None),
        ({"a.py": "x = 2\n", "tests/b b/test_ b.py": "# 2\n"}, "Two (#7)\r\n\r\nMore\r", None),
        (
            {"a.py": "x = 2\n", "test_a.py": "# 2\n", "tests/line\nend.py": "# 2\n"},
            "Two (#7)",
            "changes a file whose name is no plain UTF-8",
        ),
    ],
)
def test_reasons_of_the_default_rule(small_repo, files, message, reason):
    repo, commit = small_repo
    commit(files, message)
    [row] = mined(repo)
    assert row["query_id"] == "small-7" and row["reasons"] == ([reason] if reason else [])
    if not reason:
        assert row["pr"]["run"] == [name for name in files if re.search("test_|^tests/", name)]


@pytest.mark.parametrize(
    "path, kind",
    [
        ("src/x/test.ts", "test"),
        ("pkg/a_test.go", "test"),
        ("tests/it.rs", "test"),
        ("a.spec.tsx", "test"),
        ("app/tests.py", "test"),
        ("unit_tests/a.py", "test"),
        ("functional-tests/a.py", "test"),
        ("Tests/a.js", "test"),
        ("app/a_tests.py", "test"),
        ("pkg/testdata/a.go", "test"),
        ("src/latest/a.py", "code"),
        ("src/greatest.py", "code"),
        ("src/lib.rs", "code"),
        ("src/contest.py", "code"),
        ("poetry.lock", "generated"),
    ],
)
def test_tests_are_told_by_folder_as_well_as_by_name(path, kind):
    assert stage.kinds_of({path: "diff"})[kind] == [path]


@pytest.mark.parametrize(
    "subject, number, title",
    [
        ("Two (#6) (#7)", 7, "Two (#6)"),
        ("Two (#7) [skip ci]", 7, "Two"),
        ("Two (#7).", 7, "Two"),
        ("Two (PR #7)", 7, "Two"),
        ("gh-6: Two (GH-7)", 7, "gh-6: Two"),
        ("Rollup merge of #7 - ada:two, r=eve", 7, ""),
        ("Merge pull request #7 in ADA/small from ada/two to main", 7, ""),
        ("Two (fixes #7)", None, None),
        ("Two #7", None, None),
        ("Two (ada/small#7)", None, None),
    ],
)
def test_subjects_of_squashed_pull_requests(small_repo, subject, number, title):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, subject)
    found = [(row["meta"]["number"], row["meta"]["title"], row["reasons"]) for row in mined(repo)]
    assert found == ([(number, title, [])] if number else [])


def test_merge_queues_are_read_and_a_person_whose_work_a_bot_merged_is_no_bot(small_repo):
    repo, commit = small_repo
    for number, (subject, author) in enumerate(
        (
            ("Merge #1", "bors[bot]"),
            ("Auto merge of #2 - ada:two, r=eve", "bors"),
            ("Three (#3)", "queue[bot]"),
        ),
        1,
    ):
        git(repo, "checkout", "-q", "-b", f"b{number}")
        commit({"a.py": f"x = {number + 1}\n", "test_a.py": f"# {number}\n"}, "work")
        git(repo, "checkout", "-q", "main")
        git(
            repo,
            "merge",
            "-q",
            "--no-ff",
            "-m",
            f"{subject}\n\n{number}: Title of it",
            f"b{number}",
            author=author,
        )
    commit({"a.py": "x = 9\n", "test_a.py": "# 9\n"}, "Four (#4)", author="dependabot[bot]")
    assert {row["meta"]["number"]: row["reasons"] for row in mined(repo)} == {
        1: [],
        2: [],
        3: [],
        4: ["made by a bot"],
    }


def test_the_licence_at_the_base_decides_and_any_file_of_it_counts(small_repo):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 1\n", "LICENSE": "All rights reserved"}, "One (#1)")
    commit(
        {"a.py": "x = 3\n", "test_a.py": "# 2\n", "COPYING": "See LICENSE-MIT", "LICENSE-MIT": LICENCE},
        "Two (#2)",
    )
    commit({"a.py": "x = 4\n", "test_a.py": "# 3\n"}, "Three (#3)")
    assert [row["reasons"] for row in mined(repo)] == [
        [],
        ["no permissive licence file at the base commit"],
        [],
    ]


@pytest.mark.parametrize("name", ["Business Source License 1.1", "Functional Source License", "Commons Clause"])
def test_a_licence_that_only_names_a_permissive_one_is_none(small_repo, name):
    repo, commit = small_repo
    text = f"{name}\n\nChange License: Apache License, Version 2.0\n{LICENCE}"
    commit({"LICENSE": text}, "another licence")
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    assert [row["reasons"] for row in mined(repo)] == [["no permissive licence file at the base commit"]]


FORGES = {
    "Merge pull request #1 from ada/one": "Title\n\nMore",
    "Merge pull request 'Title' (#2) from ada/two into main": "Reviewed-on: somewhere",
    "Merge branch 'three' into 'main'": "Title\n\nMore\n\nSee merge request group/small!3",
    "Merged in four (pull request #4)": "Title\n\nApproved-by: Eve",
    "Merged PR 5: Title": "Related work items: #77",
    "Title (#6)": "* work",
    "Merge branch 'old' into 'main'": "no request",
}


def test_merges_of_github_gitea_gitlab_bitbucket_and_azure(small_repo):
    repo, commit = small_repo
    for number, (subject, body) in enumerate(FORGES.items(), 1):
        git(repo, "checkout", "-q", "-b", f"b{number}")
        commit({"a.py": f"x = {number + 1}\n", "test_a.py": f"# {number}\n"}, "work")
        git(repo, "checkout", "-q", "main")
        git(repo, "merge", "-q", "--no-ff", "-m", f"{subject}\n\n{body}", f"b{number}")
    rows = {row["meta"]["number"]: row for row in mined(repo)}
    assert sorted(rows) == [1, 2, 3, 4, 5, 6]
    assert {row["meta"]["title"] for row in rows.values()} == {"Title"}
    assert [row["reasons"] for row in rows.values()] == [[]] * 6


def test_what_a_commit_takes_back_by_its_hash_is_left_out(small_repo):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 1\n"}, "One (#1)")
    head = git(repo, "rev-parse", "HEAD").strip()
    commit({"a.py": "x = 1\n", "test_a.py": "# 2\n"}, f"Undo it (#2)\n\nThis reverts commit {head}.")
    assert [row["reasons"] for row in mined(repo)] == [["a revert"], ["reverted later"]]


def test_a_file_name_that_is_no_utf8_and_a_submodule_stop_nothing(small_repo, tmp_path):
    """Strange names beside the change come along; a pull request that changes such a file is left out."""
    repo, commit = small_repo
    strange = os.fsdecode(b"tests/caf\xe9 \"one\".txt")
    link = git(repo, "rev-parse", "HEAD").strip()
    (repo / "tests" / "empty").mkdir(parents=True)
    git(repo, "update-index", "--add", "--cacheinfo", f"160000,{link},tests/module")
    (repo / "tests" / "bin.dat").write_bytes(bytes(range(256)))
    commit({strange: "1\n", "tests/tab\there": "x\r\ny\r\n"}, "Names (#1)")
    git(repo, "update-index", "--add", "--cacheinfo", f"160000,{link},tests/module")
    commit({"a.py": "x = 2\r\n", "test_a.py": "# 2\n"}, "Two (#2)")
    rows = mined(repo)
    assert [row["reasons"] for row in rows] == [[], ["changes a file whose name is no plain UTF-8"]]
    head = rows[0]["meta"]["commit"]
    stage.checkout(repo, head, tmp_path / "tree")
    expected = {strange, "tests/bin.dat", "tests/tab\there", "LICENSE", "a.py", "test_a.py"}
    found = {str(path.relative_to(tmp_path / "tree")) for path in (tmp_path / "tree").rglob("*")}
    assert found - {"tests"} == expected == set(stage.paths_of(repo, head))
    assert (tmp_path / "tree" / "tests" / "bin.dat").read_bytes() == bytes(range(256))
    assert (tmp_path / "tree" / "a.py").read_bytes() == b"x = 2\r\n"


def test_a_history_named_by_sha256_is_mined_as_any_other(tmp_path):
    repo = tmp_path / "long"
    repo.mkdir()
    git(repo, "init", "-q", "-b", "trunk", "--object-format=sha256")
    for number in (1, 2):
        (repo / "LICENSE").write_text(LICENCE)
        (repo / "a.py").write_text(f"x = {number}\n")
        (repo / "test_a.py").write_text(f"# {number}\n")
        git(repo, "add", "-A")
        git(repo, "commit", "-q", "-m", f"Change (#{number})")
    [row] = mined(repo)
    assert row["reasons"] == [] and len(row["meta"]["base"]) == 64 and len(row["pr"]["blobs"][0]) == 64


@pytest.mark.parametrize("name, query_id", [("~my repo", "my-repo-7"), (".dots", "dots-7"), ("é", "é-7")])
def test_a_folder_of_any_name_gives_ids_that_04_takes(small_repo, name, query_id):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    [row] = mined(repo.rename(repo.with_name(name)))
    assert row["query_id"] == query_id
    pattern = importlib.import_module("04_eval").TASK["properties"]["query_id"]["pattern"]
    assert re.match(pattern, query_id)


def test_what_was_reverted_later_is_left_out(small_repo):
    repo, commit = small_repo
    for number in (1, 2, 3):
        commit({"a.py": f"x = {number + 1}\n", "test_a.py": f"# {number}\n"}, f"Change {number} (#{number})")
    commit({"a.py": "x = 3\n", "test_a.py": "# 4\n"}, 'Revert "Change 3 (#3)" (#4)')
    commit({"a.py": "x = 1\n", "test_a.py": "# 5\n"}, "Revert the first (#5)\n\nThis reverts #1.")
    reasons = [row["reasons"] for row in mined(repo)]
    assert reasons == [["a revert"], ["a revert"], ["reverted later"], [], ["reverted later"]]


def test_what_was_brought_back_after_a_revert_stands(small_repo):
    repo, commit = small_repo
    two, one = [{"a.py": f"x = {n}\n", "test_a.py": f"# {n}\n"} for n in (2, 1)]
    commit(two, "Two (#1)")
    commit(one, 'Revert "Two (#1)" (#2)')
    commit(two, 'Revert "Revert "Two (#1)" (#2)" (#3)\n\nFixes #1. Reverts ada/small#2')
    assert [row["reasons"] for row in mined(repo)] == [["a revert"], ["a revert"], []]


def test_a_number_that_is_used_again_where_a_repository_moved_is_another_pull_request(small_repo):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 1\n"}, "Of the old place (#1)")
    commit({"a.py": "x = 3\n", "test_a.py": "# 2\n"}, "Of the new place (#1)")
    commit({"a.py": "x = 4\n", "test_a.py": "# 3\n"}, "Of the new place (#1)")
    assert [(row["query_id"], row["reasons"]) for row in mined(repo)] == [
        ("small-1", []),
        ("small-1.2", ["the same number and title again (a back-port)"]),
        ("small-1.3", []),
    ]


def test_a_backport_under_another_number_is_the_same_task(small_repo):
    repo, commit = small_repo
    change = {"a.py": "x = 2\n", "test_a.py": "# 2\n"}
    git(repo, "checkout", "-q", "-b", "old")
    commit(change, "Change (#2)")
    git(repo, "checkout", "-q", "main")
    commit(change, "Change (#1)")
    git(repo, "merge", "-q", "--no-ff", "-s", "ours", "-m", "join", "old")
    assert sorted(row["reasons"] for row in mined(repo)) == [[], ["the same change as another pull request"]]


def test_rule_of_the_paper_draws_the_same_hundred_and_prints_its_funnel(small_repo, tmp_path):
    repo, commit = small_repo
    commit({"notes.md": "hello\n"}, "Notes (#1)")
    commit({"a.py": "x = 2\n", "b.py": "y = 1\n"}, "Code (#2)")
    commit({"a.py": "x = 3\n" * 1000}, "Long (#3)")
    for number in range(4, 107):
        commit({"a.py": f"x = {number}\n"}, f"Change (#{number})")
    rows = mined(repo, rule="paper")
    reasons = [tuple(row["reasons"]) for row in rows]
    assert reasons.count(()) == 100 and reasons.count((stage.NOT_DRAWN,)) == 3
    assert reasons[-1] == ("only markdown",) and reasons[-3] == ("not under 1,200 tokens",)
    assert [row["reasons"] for row in mined(repo, rule="paper")] == [row["reasons"] for row in rows]
    assert [row["reasons"] for row in mined(repo, rule="paper", seed=1)] != [row["reasons"] for row in rows]


def test_newest_of_each_repository_first(small_repo, demo_clone):
    repo, commit = small_repo
    for number in range(1, 4):
        commit({"a.py": f"x = {number + 5}\n", "test_a.py": f"# {number}\n"}, f"Change (#{number})")
    rows = mined(repo, demo_clone, max_candidates=3)
    assert [row["query_id"] for row in rows if not row["reasons"]] == ["small-3", "small-2", "pr_repo-10"]


def test_a_bad_clone_is_named_and_the_others_go_on(tmp_path, small_repo, demo_clone, capsys):
    (tmp_path / "folder").mkdir()
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{demo_clone}", "shallow")
    git(tmp_path, "init", "-q", "empty")
    rows = mined(
        tmp_path / "folder", tmp_path / "shallow", demo_clone, tmp_path / "empty", tmp_path / "nowhere"
    )
    assert len(rows) == 11
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    for line, text in zip(
        told, ("not a git repository", "fetch --unshallow", "symbolic-ref HEAD", "nowhere"), strict=True
    ):
        assert text in line


def test_a_run_with_a_bad_clone_ends_well(tmp_path, small_repo, endpoint):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n"}, "Two (#7)")
    (tmp_path / "folder").mkdir()
    endpoint.script = lambda call, request: (200, completion(json.dumps(DRAFT | {"query": GOOD})), 1)
    flags = "--repos", tmp_path / "folder", tmp_path / "nowhere", repo, "--base_url", endpoint.url
    output = tmp_path / "out" / "queries.jsonl"
    told = run(*flags, "--rule", "paper", "--output_file", output)
    assert "queries: 1\n" in told and "verify: pull requests are not run" in told
    assert "verify: 1 of" not in told
    inputs = json.loads((output.parent / "queries.settings.json").read_text())["inputs"]
    head = git(repo, "rev-parse", "HEAD").strip()
    clones = tmp_path / "folder", tmp_path / "nowhere", repo
    assert [inputs[str(clone)] for clone in clones] == [None, None, head]


def test_a_workspace_has_the_same_bytes_whenever_it_is_written(tmp_path):
    for name, seconds in (("b/one", 1), ("a/two", 1_000_000)):
        folder = tmp_path / name
        for file in ("z.txt", "sub/a.txt"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(file)
            os.utime(folder / file, (seconds, seconds))
        stage.write_tar(folder, tmp_path / f"{seconds}.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "1000000.tar").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_bad_repositories(tmp_path, small_repo, demo_clone):
    repo, commit = small_repo
    flags = "--output_file", tmp_path / "out" / "queries.jsonl", "--repos"
    assert "both called pr_repo" in refused(*flags, demo_clone, demo_clone)
    assert "nothing to read" in refused()
    assert "must be 1 or more" in refused(*flags, demo_clone, "--concurrency", 0)
    assert "500 or less: 04 ends a check after 600 s" in refused(*flags, demo_clone, "--timeout", 501)
    paper = "--rule", "paper"
    assert "--max_candidates does nothing with --rule paper" in refused(*flags, demo_clone, *paper, "--max_candidates", 10)
    assert "--seed does nothing with --rule tests" in refused(*flags, demo_clone, "--seed", 1)
    line = refused(*flags, demo_clone, "--test_command", "pytest -q")
    assert "must write JUnit XML: pytest --junitxml={report}" in line
    assert "no merged pull request was found" in refused(*flags, repo)
    commit({"a.py": "x = 2\n"}, "No tests (#1)")
    line = refused(*flags, repo)
    assert "no query is left" in line and line.endswith(
        "mostly (1 of 1): no test file changed: mine repositories whose pull requests bring tests, "
        "or use --rule paper"
    )
    assert not (tmp_path / "out" / "queries.jsonl").exists()
    assert rows_of(tmp_path / "out" / "rejected_queries.jsonl")[0]["reasons"] == ["no test file changed"]


def test_the_last_line_speaks_of_what_came_farthest():
    rows = [{"reasons": ["no code file changed"]}] * 5 + [{"reasons": [stage.BEYOND], "material": {}}] * 3
    assert stage.what_to_do(rows) == "mostly (5 of 8): no code file changed: mine more repositories"
    rows += [{"reasons": ["environment: cannot be built: no gcc"], "material": {}}] * 2
    assert stage.what_to_do(rows) == (
        "mostly (2 of 2): environment: cannot be built: no gcc: install what is missing with --setup_command"
    )


def test_repository_of_a_benchmark_is_refused_whatever_its_folder_is_called(small_repo, demo_clone):
    repo, commit = small_repo
    with pytest.raises(stage.InputError, match="pr_repo is part of a benchmark"):
        mined(demo_clone, deny=["other", "PR_repo"])
    commit({"pyproject.toml": '[project]\nname = "requests"\n'}, "name")
    with pytest.raises(stage.InputError, match="small is part of a benchmark"):
        mined(repo)


def test_a_log_of_200_mb_is_mined_in_little_memory(small_repo):
    repo, commit = small_repo
    commit({"big.txt": "x" * 99 + "\n"}, "Big (#1)")
    (repo / "big.txt").write_bytes((b"y" * 99 + b"\n") * 2_000_000)
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Bigger (#2)")
    code = (
        "import importlib, resource, sys; sys.path.insert(0, sys.argv[1]); "
        "s = importlib.import_module('01_build_queries'); "
        "a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "list(s.pull_requests(sys.argv[2])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(repo)], capture_output=True, text=True)
    assert int(done.stdout) < 60_000  # KiB


# ---- verify: one history with a pull request for every case, proven by 04 in its own sandbox ----

CASES = {  # number: (module that it changes, its new text, its test, reason or None)
    1: (
        "m1",
        "x = 2\n",
        "import m1\n\ndef test_old():\n    assert m1.x\n\ndef test_new():\n    assert m1.x == 2\n",
        None,
    ),
    2: (
        "m2",
        "x = 2\n",
        "import m2\n\ndef test_new():\n    assert m2.x > 0\n",
        "its tests pass without the change too",
    ),
    3: (
        "m3",
        "x = 2\n",
        "import m3\n\ndef test_new():\n    assert m3.x == 3\n",
        "its tests fail with the change too",
    ),
    4: (
        "m4",
        "x = 2\n",
        "import no_such_module\n\ndef test_new():\n    pass\n",
        "environment: its tests need the module no_such_module",
    ),
    5: (
        "m5",
        "x = 2\n",
        "import m5\n\ndef test_new():\n    assert m5.x == 2\n\ndef test_other():\n    assert 0\n",
        None,
    ),
    6: (
        "m6",
        "x = 2\n",
        "import pytest, m6\n\n@pytest.mark.parametrize('n', ['one two', 'one three'])\n"
        "def test_n(n):\n    print('PASSED x')\n    assert m6.x == 2 or n == 'one three'\n",
        None,
    ),
    7: (
        "m7",
        "x = 2\n\ndef fresh():\n    return 1\n",
        "from m7 import fresh\n\ndef test_new():\n    assert fresh()\n",
        None,
    ),
    8: (
        "m8",
        "x = 2\n",
        "import urllib.request, m8\n\ndef test_new():\n    urllib.request.urlopen('http://example.com')\n",
        "environment: its tests need the network",
    ),
    9: (
        "m9",
        "x = 2\n",
        "import unittest, m9\n\nclass T(unittest.TestCase):\n    def test_new(self):\n"
        '        """First line.\n\n        Second."""\n        for n in range(3):\n'
        "            with self.subTest(n=n):\n"
        "                self.assertEqual(m9.x, 2)\n",
        None,
    ),
    10: (
        "m10",
        "x = 2\n",
        "import m10\n\ndef test_new(frozen):\n    assert m10.x\n",
        "environment: the plug-in with the fixture frozen is missing",
    ),
    11: (  # more tests than 04 keeps characters of a check's output
        "m11",
        "x = 2\n",
        "import pytest, m11\n\n@pytest.mark.parametrize('n', range(900))\n"
        "def test_with_a_long_name(n):\n    assert n < 600 or m11.x == 2\n",
        None,
    ),
}


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """(folder, rows after verify) of the history of CASES; its options name a plug-in that is missing."""
    folder = tmp_path_factory.mktemp("proven")
    repo = folder / "cases"
    repo.mkdir()
    git(repo, "init", "-q", "-b", "main")
    (repo / "LICENSE").write_text(LICENCE)
    (repo / "pytest.ini").write_text("[pytest]\naddopts = --cov=cases\n")
    for module, *_ in CASES.values():
        (repo / f"{module}.py").write_text("x = 1\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "start")
    for number, (module, text, test, _) in CASES.items():
        (repo / f"{module}.py").write_text(text)
        (repo / f"test_{module}.py").write_text(test)
        git(repo, "add", "-A")
        git(repo, "commit", "-q", "-m", f"Change {module} (#{number})")
    settings = stage.Settings(repos=[str(repo)], setup_command=OFFLINE, verify_runs=1)
    (folder / "work").mkdir()
    rows = stage.verify(settings, folder / "work", stage.mine(settings, None, []))
    return settings, folder / "work", {row["meta"]["number"]: row for row in rows}


@needs_bwrap
@pytest.mark.parametrize("number", CASES)
def test_a_task_proves_itself_or_the_reason_is_named(proven, number):
    reason = CASES[number][3]
    assert proven[2][number]["reasons"] == ([reason] if reason else [])


@needs_bwrap
def test_tests_are_told_apart_by_their_whole_names(proven):
    meta = {number: row["meta"] for number, row in proven[2].items()}
    assert meta[1]["fail_to_pass"] == ["test_m1::test_new"] and meta[1]["pass_to_pass"] == [
        "test_m1::test_old"
    ]
    assert meta[6]["fail_to_pass"] == ["test_m6::test_n[one two]"]
    assert meta[6]["pass_to_pass"] == ["test_m6::test_n[one three]"]
    assert meta[9]["fail_to_pass"] == ["test_m9.T::test_new"]
    assert len(meta[11]["fail_to_pass"]) == 300 and len(meta[11]["pass_to_pass"]) == 600


@needs_bwrap
def test_what_was_verified_is_not_verified_again(proven, monkeypatch):
    settings, work, rows = proven
    monkeypatch.setattr(stage, "run_agents", None)
    again = stage.verify(settings, work, stage.mine(settings, None, []))
    assert {row["meta"]["number"]: row["reasons"] for row in again} == {
        number: row["reasons"] for number, row in rows.items()
    }


@needs_bwrap
def test_neither_the_workspace_nor_the_environment_holds_the_tests_or_the_solution(proven):
    _, work, rows = proven
    for row in rows.values():
        if row["reasons"]:
            continue
        with tarfile.open(row["task"]["workspace"]) as tar:
            texts = {
                name: tar.extractfile(name).read().decode()
                for name in tar.getnames()
                if tar.getmember(name).isfile()
            }
        assert not any(name.startswith("./.git") for name in texts)
        module = row["pr"]["code"][0]
        assert texts[f"./{module}"] == "x = 1\n" and f"./test_{module}" not in texts
        assert Path(row["task"]["private"], "solution", module).read_text().startswith("x = 2\n")


@needs_bwrap
def test_a_proven_task_is_written_as_04_reads_it(proven, tmp_path):
    settings, work, rows = proven
    row = dict(rows[1], turns=[rows[1]["task"]["turns"][0]], domain="vibe_coding")
    stage.write_both(tmp_path / "queries.jsonl", [row], [])
    evaluation = importlib.import_module("04_eval")
    [task] = evaluation.read_tasks(evaluation.Settings(tasks=[str(tmp_path / "queries.jsonl")]), {})
    assert task["private"] == tmp_path / "private" / "cases-1" and task["workspace"].suffix == ".tar"
    assert Path(task["venv"], "bin", "python").exists()
    assert not {"pr", "material", "task", "reasons"} & task.keys()


def survey(failed):
    told = {"passed": [], "failed": failed, "end": ""}
    packed = base64.b64encode(zlib.compress(json.dumps(told).encode())).decode()
    return {"rounds": [{"checks": [{"requirement": f"survey {packed}"}]}]}


@pytest.mark.parametrize(
    "message, reason",
    [
        ("assert 1 == 2", "its tests fail with the change too"),
        ("ModuleNotFoundError: No module named 'x.y'", "environment: its tests need the module x.y"),
        ("locale.Error: unsupported locale setting", "environment: its tests need a locale or time zone"),
        ("zoneinfo: No time zone found with key X", "environment: its tests need a locale or time zone"),
        ("KeyError: 'getpwuid(): uid not found'", "environment: its tests need a user of the system"),
        ("socket.gaierror: [Errno -3]", "environment: its tests need the network"),
        ("connect ECONNREFUSED 127.0.0.1:6379", "environment: its tests need a server that does not run"),
        ("TclError: no display name", "environment: its tests need a server that does not run"),
        ("No such file or directory: 'git'", "environment: its tests need the program git"),
        ("bash: line 1: jq: command not found", "environment: its tests need the program jq"),
    ],
)
def test_what_an_environment_lacks_is_told_from_the_messages(message, reason):
    after = [survey({"test_it": message})]
    assert stage.judge_survey([survey({"test_it": "no"})], after, 9)["reason"].startswith(reason)


def test_a_candidate_that_cannot_be_laid_out_stops_no_other_and_is_tried_again(
    small_repo, tmp_path, monkeypatch
):
    """The clone lacks a file's content, as one that was made with a filter does."""
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 1\n", "tests/data.txt": "gone"}, "One (#1)")
    commit({"a.py": "x = 3\n", "test_a.py": "# 2\n", "tests/data.txt": "here"}, "Two (#2)")
    commit({"a.py": "x = 4\n", "test_a.py": "# 3\n"}, "Three (#3)")
    rows = mined(repo)
    name = git(repo, "rev-parse", "HEAD~2:tests/data.txt").strip()
    (repo / ".git" / "objects" / name[:2] / name[2:]).unlink()
    ran = []

    def agents(folder, tasks, runs):
        ran.append([task["query_id"] for task in tasks])
        return {"nothing": stage.defaultdict(list), "solution": stage.defaultdict(list)}, {}

    monkeypatch.setattr(stage, "run_agents", agents)
    for folder in ("made", "venv"):
        (tmp_path / folder).mkdir()
    environment = {"folder": tmp_path, "id": "1", "program": "", "runner": "pytest"}
    for _ in range(2):
        again = [dict(row, reasons=[]) for row in rows]
        stage.verify_group(stage.Settings(), tmp_path, "small", again, environment)
        told = [row["reasons"][0] for row in again]
        assert told[0] == "could not be decided: no episode was left"
        for reason in told[1:]:
            assert reason.startswith("could not be decided: ") and "git checkout-index" in reason
    assert ran == [["small-3"], ["small-3"]]


def test_a_task_is_found_from_a_relative_output_and_proven_anew_where_its_history_was_rewritten(
    small_repo, tmp_path, monkeypatch
):
    repo, commit = small_repo
    ran = []

    def agents(folder, tasks, runs):
        [task] = tasks
        assert all(Path(task[key]).is_absolute() for key in ("workspace", "private", "venv"))
        with tarfile.open(task["workspace"]) as tar:
            ran.append((folder.parent.name, tar.extractfile("./a.py").read()))
        return {"nothing": stage.defaultdict(list), "solution": stage.defaultdict(list)}, {}

    monkeypatch.setattr(stage, "run_agents", agents)
    monkeypatch.chdir(tmp_path)
    for start in ("x = 5\n", "x = 7\n"):
        git(repo, "reset", "-q", "--hard", git(repo, "rev-list", "--max-parents=0", "HEAD").strip())
        commit({"a.py": start}, "another start")
        commit({"a.py": "x = 6\n", "test_a.py": "# 2\n"}, "Two (#7)")
        for step in ("mine", "verify"):
            run("--repos", repo, "--setup_command", "true", "--output_file", "out/q.jsonl", "--step", step)
    assert [text for _, text in ran] == [b"x = 5\n", b"x = 7\n"] and ran[0][0] != ran[1][0]


def test_a_proven_task_whose_clone_is_gone_stops_no_other(small_repo, tmp_path, monkeypatch):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    found = {"reason": None, "fail_to_pass": ["test_a::test_2"], "pass_to_pass": []}
    monkeypatch.setattr(stage, "verify_repository", lambda *given: {"small-7": found})
    settings = stage.Settings(repos=[str(repo)], setup_command="true")
    rows = stage.mine(settings, None, [])
    assert stage.verify(settings, tmp_path, [dict(rows[0])])[0]["task"]["query_id"] == "small-7"
    repo.rename(tmp_path / "gone")
    [row] = stage.verify(settings, tmp_path, rows)
    assert row["reasons"][0].startswith("could not be decided: ") and "small" in row["reasons"][0]


def test_what_04_found_before_proves_nothing_where_it_refuses_now(tmp_path, monkeypatch):
    (tmp_path / "refuses.py").write_text("import sys; print('other settings'); sys.exit(2)\n")
    monkeypatch.setattr(stage, "EVALUATE", tmp_path / "refuses.py")
    (tmp_path / "find" / "nothing").mkdir(parents=True)
    (tmp_path / "find" / "nothing" / "summary.json").write_text("{}")
    with pytest.raises(stage.InputError, match="--agent nothing says: other settings"):
        stage.run_agents(tmp_path / "find", [task("a", "do a")], 3)
    chains = tmp_path / "verify" / "chains"
    chains.mkdir(parents=True)
    stage.add_chains(stage.Settings(chain=2), tmp_path, [])
    assert not chains.exists()


@needs_bwrap
def test_tests_that_do_not_end_are_ended(small_repo, tmp_path):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    settings = stage.Settings(
        repos=[str(repo)], setup_command="true", test_command="sleep 60 > {report}", timeout=2, verify_runs=1
    )
    [row] = stage.verify(settings, tmp_path, stage.mine(settings, None, []))
    assert row["reasons"] == ["its tests run longer than 2 s"]


@needs_bwrap
def test_thirty_coins_are_no_tasks(small_repo, tmp_path):
    """A test that passes every other time, on either side: none of thirty comes through the runs of 04."""
    repo, commit = small_repo
    commit({f"m{n}.py": "x = 1\n" for n in range(30)}, "modules")
    for number in range(30):
        commit({f"m{number}.py": "x = 2\n", f"test_m{number}.py": ""}, f"Coin (#{number + 1})")
    coin = (
        "[ $((RANDOM % 2)) = 1 ] || bad='<failure message=\"tails\"/>'; "
        "echo \"<r><testcase classname='coin' name='toss'>$bad</testcase></r>\" > {report}"
    )
    settings = stage.Settings(repos=[str(repo)], setup_command="echo 'runner: custom'", test_command=coin)
    (tmp_path / "work").mkdir()
    rows = stage.verify(settings, tmp_path / "work", stage.mine(settings, None, []))
    verdicts = [row["reasons"][0].split(":")[0] for row in rows if row["reasons"]]
    assert len(verdicts) == 30 and verdicts.count("its tests are flaky") > 15
    assert set(verdicts) <= {
        "its tests are flaky",
        "its tests pass without the change too",
        "its tests fail with the change too",
    }


@needs_bwrap
def test_a_package_that_is_installed_already_is_an_error_and_its_lines_are_found(small_repo, tmp_path):
    """The released version in the environment: its import is not the workspace's, and it holds the answer."""
    repo, commit = small_repo
    fix = 'GREETING = "good morning to you all"\n'
    commit({"greet.py": "GREETING = 'hi'\n"}, "module")
    commit(
        {
            "greet.py": fix,
            "test_greet.py": "import greet\n\ndef test_it():\n    assert 'all' in greet.GREETING\n",
        },
        "Greet (#1)",
    )
    site_packages = f"$ENVIRONMENT/lib/python3.{sys.version_info.minor}/site-packages"
    for name, reason in (
        ("greet", "could not be decided: bailed_out: greet is imported from /opt/venv"),
        ("vendored", "its solution stands in its environment"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / "released.py").write_text(fix)
        command = f"{OFFLINE} && cp {tmp_path}/released.py {site_packages}/{name}.py"
        settings = stage.Settings(repos=[str(repo)], setup_command=command, verify_runs=1)
        [row] = stage.verify(settings, tmp_path / name, stage.mine(settings, None, []))
        assert row["reasons"][0].startswith(reason)


@pytest.mark.parametrize(
    "path, runner, known",
    [
        ("made/vendor/m/m.go", "go", True),
        ("venv/node_modules/m/index.js", "node", True),
        ("made/vendor/m/lib.rs", "cargo", True),
        ("venv/lib/rustlib/m.rs", "cargo", False),  # the toolchain is everybody's
        ("venv/notes.txt", "pytest", False),
    ],
)
def test_a_solution_that_a_dependency_has_is_seen(tmp_path, path, runner, known):
    line = "total += weights[position] * values[position]"
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(f"first\n    {line}\n")
    lines = stage.lines_at_hand({"folder": tmp_path, "runner": runner})
    assert stage.stands_in(lines, f"--- a/m\n+++ b/m\n@@ -1 +1 @@\n-total = 0\n+{line}\n") is known


def test_a_missing_tool_and_a_failing_setup_are_named_once_a_repository(
    small_repo, tmp_path, monkeypatch, capsys
):
    repo, commit = small_repo
    for number in (1, 2):
        commit({"a.py": f"x = {number + 1}\n", "test_a.py": f"# {number}\n"}, f"Change (#{number})")
    odd = os.fsdecode(b"caf\xe9-1.2")
    git(repo, "update-ref", f"refs/tags/{odd}", "HEAD")
    git(repo, "update-ref", "refs/pull/draft/head", "HEAD")  # no number, and bytes that are no UTF-8
    command = "printf 'caf\\351\\nerror: failed\\nCaused by\\n  Could not resolve host (x)\\n'; exit 1"
    settings = stage.Settings(repos=[str(repo)], setup_command=command)
    rows = stage.verify(settings, tmp_path, stage.mine(settings, None, []))
    problem = "cannot be built: error: failed ... Could not resolve host"
    assert [row["reasons"] for row in rows] == [[f"environment: {problem}"]] * 2
    told = "small: no environment for its 2 candidates: "
    assert capsys.readouterr().out.count(told + problem) == 1
    settings.setup_command = "sleep 600"
    settings.setup_seconds = 1
    stage.verify(settings, tmp_path, stage.mine(settings, None, []))
    assert told + "took longer than --setup_seconds 1" in capsys.readouterr().out
    monkeypatch.setitem(stage.TOOLCHAINS, "python", "no-such-python")
    stage.verify(settings, tmp_path, stage.mine(settings, None, []))
    assert told + "no-such-python is not installed" in capsys.readouterr().out
    monkeypatch.undo()
    rows = stage.mine(settings, None, [])
    repo.rename(tmp_path / "gone")
    rows = stage.verify(settings, tmp_path, rows)
    assert told in capsys.readouterr().out and rows[0]["reasons"][0].endswith("No such file or directory")


@needs_bwrap
def test_dependent_pull_requests_become_the_turns_of_one_task(small_repo, tmp_path):
    repo, commit = small_repo
    for number in (1, 2, 3):
        test = f"import a\n\ndef test_{number}():\n    assert a.x > {number}\n"
        commit({"a.py": f"x = {number + 1}\n", f"test_a{number}.py": test}, f"Change {number} (#{number})")
    settings = stage.Settings(repos=[str(repo)], setup_command=OFFLINE, chain=2, verify_runs=1)
    rows = stage.verify(settings, tmp_path, stage.mine(settings, None, []))
    assert {row["query_id"]: row["reasons"] for row in rows} == {
        "small-1": [],
        "small-2": [],
        "small-3": [],
        "small-1-to-2": [],
    }
    for row in rows[:3]:
        row["turns"], row["domain"] = [{"query": f"query {row['query_id']}"}], "vibe_coding"
    stage.fill_chains(rows)
    chain = rows[3]
    assert [turn["query"] for turn in chain["turns"]] == ["query small-1", "query small-2"]
    assert chain["turns"][1]["check"] == "python3 -I /private/2/check.py"
    assert [row["reasons"] for row in rows[1:3]] == [["a turn of small-1-to-2"]] * 2


# ---- write ----

DRAFT = {
    "reason": "r",
    "answerable": True,
    "query": "q",
    "interfaces": [],
    "rubric": ["works"],
    "subdomain": "backend",
    "difficulty": "medium",
}


@pytest.fixture
def endpoint():
    """A server whose script(number of the call, request) gives (status, body, share of it to send)."""
    given = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.calls += 1
            status, body, share = server.script(server.calls, request)
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("x-should-retry", "false" if status == 501 else "")
            self.end_headers()
            self.wfile.write(data[: int(len(data) * share)])
            if status == 200 and share == 1:
                given.append(request["messages"][1]["content"])
            self.close_connection = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls, server.given, server.url = 0, given, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def completion(content, finish_reason="stop", usage=None):
    return {
        "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}],
        "usage": usage or {"prompt_tokens": 10, "completion_tokens": 5},
    }


def candidates(folder, n):
    """n pull requests ready to be written, as verify leaves them."""
    material = {"text": "", "secret": "+x = 2\n", "tests": "", "asked": []}
    rows = []
    for i in range(n):
        rows.append(
            {
                "query_id": f"r-{i}",
                "source": "pull_request",
                "turns": [],
                "reasons": [],
                "pr": {},
                "meta": {"repo": "r", "title": f"title {i}", "base": "b", "commit": "c"},
                "material": material | {"text": f"Title: title {i}"},
            }
        )
    stage.write_jsonl(folder / "work" / "2_verify.jsonl", rows)
    return "--step", "write", "--repos", "r", "--output_file", folder / "queries.jsonl"


def test_killed_and_failing_run_pays_every_answer_once(endpoint, tmp_path):
    def script(call, request):
        time.sleep(0.02)
        return (500, "busy", 1) if call % 5 == 0 else (200, completion(json.dumps(DRAFT)), 1)

    endpoint.script, answers = script, tmp_path / "work" / "answers.jsonl"
    flags = [*map(str, candidates(tmp_path, 20)), "--base_url", endpoint.url, "--concurrency", "1"]
    process = subprocess.Popen(command(*flags), stderr=subprocess.DEVNULL)
    while not answers.exists() or len(answers.read_bytes().splitlines()) < 8:
        time.sleep(0.01)
    process.kill()
    process.wait()
    with open(answers, "a") as file:
        file.write('{"key": "cut by the ki')
    before = len(set(endpoint.given))
    assert "replayed" in run(*flags)
    assert len({row["key"] for row in rows_of(answers)}) == len(rows_of(answers)) == 20
    assert len(endpoint.given) - len(set(endpoint.given)) <= 1  # only the call that was under way at the kill
    assert 8 <= before < 20
    calls = len(endpoint.given)
    assert "0 answers asked for, 20 replayed" in run(*flags) and len(endpoint.given) == calls


@pytest.mark.parametrize(
    "script, message",
    [
        (lambda call, _: (200, "<html>hello</html>", 1), "not a chat completion but '<html>hello</html>'"),
        (lambda call, _: (200, {"error": "no"}, 1), "not a chat completion"),
        (lambda call, _: (401, {"error": {"message": "bad key"}}, 1), "AuthenticationError"),
        (lambda call, _: (404, {"error": {"message": "no such model"}}, 1), "NotFoundError"),
    ],
)
def test_endpoint_that_gives_no_answer(endpoint, tmp_path, script, message):
    endpoint.script = lambda call, request: (200, completion("{}"), 1) if call == 1 else script(call, request)
    flags = candidates(tmp_path, 3)
    line = refused(*flags, "--base_url", endpoint.url, "--concurrency", 1)
    assert message in line and "1 of 3 answers are stored, run again" in line
    assert endpoint.calls == 2  # none starts after a failure
    assert len(rows_of(tmp_path / "work" / "answers.jsonl")) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_rejects_its_row_and_the_others_go_on(endpoint, tmp_path, status):
    def script(call, request):
        if "title 1" in request["messages"][1]["content"]:
            return status, {"error": {"message": "Content Exists Risk"}}, 1
        return 200, completion(json.dumps(DRAFT)), 1

    endpoint.script = script
    flags = candidates(tmp_path, 4)
    run(*flags, "--base_url", endpoint.url)
    reasons = [stage.draft_of(row["answer"])[1] for row in rows_of(tmp_path / "work" / "3_write.jsonl")]
    assert [reason and "Content Exists Risk" in reason for reason in reasons] == [None, True, None, None]
    calls = endpoint.calls
    run(*flags, "--base_url", endpoint.url)
    assert endpoint.calls == calls  # it is not asked again,
    run(*flags, "--base_url", endpoint.url, "--retry_bad")
    assert endpoint.calls == calls + 1  # only when the user says so


@pytest.mark.parametrize("status", [400, 501])
def test_an_endpoint_without_json_schema_is_asked_in_the_form_that_it_knows(endpoint, tmp_path, status):
    forms = []

    def script(call, request):
        forms.append(request.get("response_format", {}).get("type"))
        if forms[-1] is None:
            return 200, completion("Sure!\n```json\n" + json.dumps(DRAFT) + "\n```\nIs {this} right?"), 1
        return status, {"error": {"message": "This response_format type is unavailable now"}}, 1

    endpoint.script = script
    run(*candidates(tmp_path, 3), "--base_url", endpoint.url, "--concurrency", 1)
    assert forms == ["json_schema", "json_object", None, None, None]
    for row in rows_of(tmp_path / "work" / "3_write.jsonl"):
        assert stage.draft_of(row["answer"])[0].query == "q"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(DRAFT),
        "```json\n" + json.dumps(DRAFT) + "\n```",
        json.dumps(DRAFT | {"more": 1}),
        '<think>{"query": "no"}</think>' + json.dumps(DRAFT) + " That {is} it.",
        [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": json.dumps(DRAFT)}],
        json.dumps(DRAFT | {"subdomain": "Backend", "difficulty": "Medium"}),
        json.dumps([{"draft": DRAFT | {"interfaces": None, "answerable": "true"}}]),
        '{"query": "..."}\nThat is the form. Mine:\n' + json.dumps(DRAFT),
        '<seed:think>{"query": "no"}</seed:think>' + json.dumps(DRAFT) * 2,
        json.dumps({key.title(): value for key, value in DRAFT.items()} | {"Difficulty": "Medium."}),
    ],
)
def test_drafts_in_every_wrapping_are_read(content):
    answer = stage.read_completion(json.dumps(completion(content, usage={"prompt_tokens": "7"})))
    assert stage.draft_of(answer)[0].model_dump() == DRAFT
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 0}


@pytest.mark.parametrize(
    "content, reason",
    [
        (
            json.dumps(DRAFT)[:40],
            'the answer (length) holds no draft: \'{"reason": "r", "answerable": true, "que\'',
        ),
        ("I cannot help with that.", "the answer (length) holds no draft: 'I cannot help with that.'"),
        (json.dumps(DRAFT | {"query": "nu\0ll"}), "the answer's query is not usable: String should match"),
        (json.dumps(DRAFT | {"query": "\ud83d"}), "the answer's query is not usable: Input should be"),
        ("{" * 9999, "the answer (length) holds no draft: '{{{"),
        (json.dumps(DRAFT | {"subdomain": "magic"}), "the answer's subdomain is not usable: Input should be"),
        (
            json.dumps(DRAFT | {"rubric": "one"}),
            "the answer's rubric is not usable: Input should be a valid list",
        ),
    ],
)
def test_answers_that_are_no_draft_say_what_they_are(content, reason):
    assert stage.draft_of({"content": content, "finish_reason": "length"})[1].startswith(reason)


@pytest.mark.parametrize(
    "message, reason",
    [
        ('"choices": [{"message": null}]', "the answer (None) holds no draft: ''"),
        ('"choices": [{"message": {"content": [{"type": "text", "text": null}]}}]', "the answer (None) hol"),
        ('"choices": [{"message": {"content": {"a": 1}}}]', "the answer (None) holds no draft: \"{'a'"),
        ('"choices": [], "prompt_filter_results": [1]', "the endpoint refused it: no choice in its answer"),
        ('"choices": null', "the endpoint refused it: no choice in its answer"),
        (
            '"choices": [{"message": {"content": "\\ud83d"}}], "usage": {"prompt_tokens": "\u00b2"}',
            "the answer (None) holds no draft: '?'",
        ),
    ],
)
def test_an_answer_without_a_text_rejects_its_row_alone(message, reason):
    answer = stage.read_completion("{" + message + "}")
    assert stage.draft_of(answer)[1].startswith(reason) and answer["usage"]["prompt_tokens"] == 0


def test_a_draft_that_cannot_be_used_is_asked_for_again(endpoint, tmp_path):
    subdomains = ["magic", "backend"]

    def script(call, request):
        return 200, completion(json.dumps(DRAFT | {"subdomain": subdomains[call - 1]})), 1

    endpoint.script = script
    flags = *candidates(tmp_path, 1), "--base_url", endpoint.url
    run(*flags)
    for calls in (2, 2):
        run(*flags, "--retry_bad")
        assert endpoint.calls == calls
    [row] = rows_of(tmp_path / "work" / "3_write.jsonl")
    assert stage.draft_of(row["answer"])[0].subdomain == "backend"


@pytest.mark.parametrize(
    "interface, ending",
    [
        ("limit", "\n\nNames to keep to: `limit`"),
        ("load(limit=3)", "\n\nNames to keep to: `load(limit=3)`"),
        (" rows ", ""),
    ],
)
def test_a_name_that_stands_only_inside_another_word_is_given(interface, ending):
    draft = stage.Draft(**DRAFT | {"query": "Unlimited rows.", "interfaces": [interface]})
    assert stage.query_of(draft) == "Unlimited rows." + ending


def test_what_a_request_has_besides_stands_in_yaml(endpoint, tmp_path):
    asked = []

    def script(call, request):
        asked.append((request["max_tokens"], request["temperature"]))
        return 200, completion(json.dumps(DRAFT)), 1

    endpoint.script = script
    (tmp_path / "x.yaml").write_text("request: {max_tokens: 99, temperature: 0.5}\n")
    run(*candidates(tmp_path, 1), "--base_url", endpoint.url, "--config", tmp_path / "x.yaml")
    assert asked == [(99, 0.5)]


def test_a_line_break_inside_a_text_is_no_end_of_it():
    content = json.dumps(DRAFT | {"query": "one two", "subdomain": "data-analysis"}).replace("one ", "one\n")
    draft, reason = stage.draft_of({"content": content, "finish_reason": "stop"})
    assert draft.query == "one\ntwo" and draft.subdomain == "data_analysis" and reason is None


def test_dry_run_shows_the_prompt_and_calls_nobody(tmp_path):
    output = run(*candidates(tmp_path, 2), "--dry_run")
    assert "Title: title 0" in output and "calls: 2\n" in output
    assert not (tmp_path / "work" / "answers.jsonl").exists()


def test_a_dry_run_from_the_start_builds_and_leaves_nothing(demo_clone, tmp_path):
    output = run("--repos", demo_clone, "--dry_run", "--output_file", tmp_path / "out" / "q.jsonl")
    assert "verify: left out" in output and "Repository: pr_repo" in output and "calls: 3\n" in output
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["work"]


def test_max_usd_counts_what_is_under_way_and_what_was_spent_before(endpoint, tmp_path):
    def script(call, request):
        time.sleep(0.1)
        return 200, completion(json.dumps(DRAFT), usage={"prompt_tokens": 0, "completion_tokens": 4000}), 1

    endpoint.script = script
    flags = (*candidates(tmp_path, 9), "--base_url", endpoint.url, "--concurrency", 8, "--max_usd", 1.7)
    assert "needs the prices" in refused(*flags)
    flags += "--price_out", 100  # an answer of 4,000 tokens costs $0.40
    line = refused(*flags)
    assert "another call may pass --max_usd 1.7; 4 of 9 answers are stored" in line
    assert endpoint.calls == 4
    assert "$1.60 spent" in refused(*flags) and endpoint.calls == 4


def test_max_usd_counts_every_answer_that_was_paid_for_one_prompt(endpoint, tmp_path):
    flags = candidates(tmp_path, 1)
    for key in ("asked", "asked", "other"):
        usage = {"prompt_tokens": 0, "completion_tokens": 4000}
        stage.append_jsonl(tmp_path / "work" / "answers.jsonl", {"key": key, "content": "", "usage": usage})
    prices = "--base_url", endpoint.url, "--price_out", 100, "--max_usd", 1.3
    assert "$1.20 spent, another call may pass --max_usd 1.3" in refused(*flags, *prices)


def test_no_endpoint_and_no_key(tmp_path):
    line = refused(*candidates(tmp_path, 2))
    assert "2 answers are missing" in line and "OPENAI_API_KEY" in line


def test_a_paper_becomes_a_research_query_with_a_rubric(endpoint, tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "warm up.md").write_text("# Warm-up\nWe show that warm-up helps.")
    draft = DRAFT | {"query": GOOD, "subdomain": "research", "rubric": ["Compares two schedules."]}
    endpoint.script = lambda call, request: (200, completion(json.dumps(draft)), 1)
    output = tmp_path / "queries.jsonl"
    run("--papers", tmp_path / "papers", "--base_url", endpoint.url, "--output_file", output)
    [task] = rows_of(output)
    assert (
        task.items()
        >= {
            "query_id": "warm-up",
            "domain": "research",
            "source": "paper",
            "turns": [{"query": GOOD, "rubric": ["Compares two schedules."]}],
        }.items()
    )
    assert "We show that warm-up helps." in endpoint.given[0]
    (tmp_path / "none").mkdir()
    assert "convert PDFs to text first" in refused("--papers", tmp_path / "none", "--output_file", output)


def test_an_issue_becomes_a_query_on_the_newest_tree_of_its_repository(endpoint, small_repo, tmp_path):
    repo, commit = small_repo
    git(repo, "remote", "add", "origin", "https://example.invalid/ada/small.git")
    found = []
    for number, (url, body) in enumerate(
        (
            ("ada/small/issues", "It stops at the first bad file."),
            ("ada/small/issues", None),
            ("ada/small/pull", ""),
            ("eve/large/issues", ""),
        ),
        1,
    ):
        url = f"https://example.invalid/{url}/{number}"
        found.append({"number": number, "title": "Loader stops", "body": body, "url": url})
    (tmp_path / "issues.json").write_text(json.dumps(found))

    def script(call, request):
        query = GOOD if "It stops" in request["messages"][1]["content"] else GOOD + " See #12."
        return 200, completion(json.dumps(DRAFT | {"query": query})), 1

    endpoint.script = script
    flags = "--repos", repo, "--base_url", endpoint.url, "--output_file", tmp_path / "out" / "queries.jsonl"
    run(*flags, "--issues", tmp_path / "issues.json")
    [task] = rows_of(tmp_path / "out" / "queries.jsonl")
    assert task["query_id"] == "ada__small-issue-1" and task["source"] == "issue"
    assert task["turns"] == [{"query": GOOD, "rubric": ["works"]}] and task["domain"] == "vibe_coding"
    assert (tmp_path / "out" / task["workspace"] / "a.py").read_text() == "x = 1\n"
    rejected = rows_of(tmp_path / "out" / "rejected_queries.jsonl")
    assert {row["query_id"]: row["reasons"] for row in rejected} == {
        "ada__small-issue-2": ["mentions an issue's number"],
        "eve__large-issue-4": ["its repository is not among --repos"],
    }
    (tmp_path / "issues.json").write_text('[{"title": "x"}]')
    line = refused(*flags, "--issues", tmp_path / "issues.json")
    assert "no list of number, title, body, url: KeyError('url')" in line
    (tmp_path / "issues.json").write_text('[{"title": "x", "body": "", "url": "x"}]')
    assert "no list of number, title, body, url: " in refused(*flags, "--issues", tmp_path / "issues.json")
    assert "needs the clones" in refused("--papers", "x", "--issues", "y")


# ---- check ----

GOOD = (
    "When the loader meets a file that it cannot read it stops the whole run, and nobody sees which it was. "
    "It should go on with the others and say the name of the file and the reason in a line at the end of it."
)


@pytest.mark.parametrize(
    "turn, reason",
    [
        ({"query": GOOD, "check": "true"}, None),
        ({"query": GOOD, "rubric": ["one"]}, None),
        ({"query": "", "check": "true"}, "the query is empty"),
        ({"query": "short", "check": "true"}, "shorter than 40 words"),
        ({"query": "it is the word " * 5000, "check": "true"}, "longer than 600 words"),
        ({"query": GOOD}, "neither a check nor a rubric"),
        ({"query": GOOD, "rubric": ["", " "]}, "an empty requirement in its rubric"),
        (
            {"query": GOOD, "rubric": ["x" * 501]},
            "a rubric of more than ten requirements, or of more than 500 characters each",
        ),
        (
            {
                "query": "Quand le lecteur rencontre un fichier illisible il arrête tout et on ne voit rien. "
                * 4,
                "check": "true",
            },
            "not in English",
        ),
    ],
)
def test_drafts_are_bounded(turn, reason):
    assert list(stage.bounds(turn)) == ([reason] if reason else [])


def written(repo, query, **draft):
    """The one candidate of a repository with a model's answer; it counts as proven."""
    [row] = [row for row in mined(repo) if not row["reasons"]]
    row["task"] = {"turns": [{"check": "c", "solution": "s"}]}
    row["answer"] = {
        "content": json.dumps(DRAFT | {"query": query} | draft),
        "finish_reason": "stop",
        "model": "m",
    }
    stage.check(stage.Settings(), Path(), [row])
    return row


def test_what_the_tests_ask_for_must_be_given_and_giving_it_is_no_leak(small_repo):
    repo, commit = small_repo
    commit({"a.py": "TEXT = 'no such file here'\n\ndef load(path):\n    return 1\n"}, "text")
    commit(
        {
            "a.py": "TEXT = 'no such file here'\n\ndef load(path, *, limit=3):\n"
            "    raise ValueError(f'too many open files ({limit} at most)')\n",
            "test_a.py": "def test_it():\n"
            "    with pytest.raises(ValueError, match=r'too many open files \\(3 at'):\n"
            "        load(1, limit=3)\n    assert str(e) == 'no such file here'\n    f('a b c d')\n",
        },
        "Refuse what is too much of it (#1)",
    )
    assert written(repo, GOOD)["reasons"] == [
        "the tests ask for a text it does not give: too many open files (3 at",
        "the tests ask for a name it does not give: limit",
    ]
    row = written(repo, GOOD + ' With limit=3 it raises ValueError: "Too many open files (3 at most)".')
    assert row["reasons"] == []
    assert row["turns"] == [
        {"query": row["turns"][0]["query"], "rubric": ["works"], "check": "c", "solution": "s"}
    ]
    row = written(
        repo, GOOD + " It says too many open files (3 at most).", interfaces=["load(path, limit=3)"]
    )
    assert row["reasons"] == [] and row["turns"][0]["query"].endswith(
        "\n\nNames to keep to: `load(path, limit=3)`"
    )
    row = written(repo, GOOD + " With limit=3: too many open files (3 at most).", rubric=["a.py is changed"])
    assert row["reasons"] == ["its rubric names the file to change: a.py"]


def test_a_name_that_the_tree_has_only_inside_another_word_must_be_given(small_repo):
    repo, commit = small_repo
    commit({"a.py": "drawn = 'Raw'\n\ndef load(path):\n    return 1\n"}, "text")
    change = "drawn = 'Raw'\n\ndef load(path, *, raw=False):\n    return raw\n"
    commit({"a.py": change, "test_a.py": "def test_it():\n    assert load(1, raw=True)\n"}, "As it is (#1)")
    assert written(repo, GOOD)["reasons"] == ["the tests ask for a name it does not give: raw"]
    assert written(repo, GOOD + " load takes raw=True for that.")["reasons"] == []


def test_a_submodule_that_a_pull_request_moved_stops_no_other(small_repo):
    repo, commit = small_repo
    for commit_of_it, message in (("2" * 40, "a module"), ("1" * 40, "Bump (#7)")):
        git(repo, "update-index", "--add", "--cacheinfo", f"160000,{commit_of_it},lib")
        git(repo, "commit", "-q", "-m", message)
    [row] = mined(repo, rule="paper")
    row["answer"] = {"content": json.dumps(DRAFT | {"query": GOOD}), "finish_reason": "stop", "model": "m"}
    stage.check(stage.Settings(), Path(), [row])
    assert row["reasons"] == []


def test_text_rules(small_repo):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    query = GOOD + " See https://x.org and #12, commit deadbee1; run pytest on shot.png"
    assert written(repo, query)["reasons"] == [
        f"mentions {what}" for what in ("a link", "an issue's number", "a commit", "an image", "the tests")
    ]
    query = GOOD + " The colours #000 and #a1b2c3d, effaced, id 0f8fad5b-d9cb-469f-a165-70867728950e."
    assert written(repo, query)["reasons"] == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("key sk-abcdefghijk1lmnopqrstuv", True),
        ("token hf_" + "a" * 34, True),
        ("write to ada@mail.org", True),
        ("a risk-adjusted-return-of-the-portfolio", False),
        ("--task-specific-learning-rate-schedule", False),
        ("clone git@github.com:owner/repo", False),
    ],
)
def test_secrets(text, found):
    assert bool(re.search(stage.SECRET, text)) == found


def test_a_judges_verdict_stands_beside_the_rules_own(endpoint, small_repo, tmp_path):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    endpoint.script = lambda call, request: (200, completion('{"leaks": true, "why": "names the trick"}'), 1)
    [row] = mined(repo)
    row["answer"] = {"content": json.dumps(DRAFT | {"query": GOOD}), "finish_reason": "stop", "model": "m"}
    settings = stage.Settings(judge_model="j", base_url=endpoint.url)
    stage.check(settings, tmp_path, [row])
    assert row["reasons"] == ["leaks, says the judge: names the trick"]
    assert row["meta"]["judge"] == {"model": "j", "leaks": True, "why": "names the trick"}


@pytest.mark.parametrize(
    "verdict, reason",
    [
        ('{"leaks": "true", "why": "a trick"}', "leaks, says the judge: a trick"),
        ('{"Leaks": true}', "leaks, says the judge: "),
        ('{"leaks": "no", "why": ""}', None),
        ("It is fine.", "the answer (stop) holds no verdict: 'It is fine.'"),
        ('{"leaks": "perhaps"}', "the answer's leaks is not usable: Input should be a valid boolean"),
    ],
)
def test_a_judges_verdict_in_any_form_counts_and_none_is_no_pass(
    endpoint, small_repo, tmp_path, verdict, reason
):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    endpoint.script = lambda call, request: (200, completion(verdict), 1)
    [row] = mined(repo)
    row["answer"] = {"content": json.dumps(DRAFT | {"query": GOOD}), "finish_reason": "stop", "model": "m"}
    stage.check(stage.Settings(judge_model="j", base_url=endpoint.url), tmp_path, [row])
    assert [told[: len(reason or "")] for told in row["reasons"]] == ([reason] if reason else [])


def test_benchmark_overlap_and_near_duplicates(tmp_path):
    prompt = "請寫一個程式把所有的照片依照拍攝的日期排序並且放進資料夾"
    english = "Write a program that sorts all of my photos by the day on which they were taken, please"
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.json").write_text(json.dumps({"tasks": [{"query": prompt}]}))
    (tmp_path / "bench" / "b.md").write_text(english.replace("my photos", "my photos".upper()))
    texts = {
        "chinese": prompt[:20],
        "copied": english,
        "own": "Draw a board and let two people play on it in turn",
        "again": "Draw a board and let two persons play on it in turn",
        "mail": "Write to ada@mail.org",
    }
    real = tmp_path / "real.jsonl"
    real.write_text(
        "".join(
            json.dumps(
                {
                    "query_id": query_id,
                    "domain": "vibe_coding",
                    "turns": [{"query": text, "rubric": ["done"]}],
                }
            )
            + "\n"
            for query_id, text in texts.items()
        )
    )
    flags = "--real", real, "--output_file", tmp_path / "queries.jsonl", "--benchmark"
    run(*flags, tmp_path / "bench")
    assert {row["query_id"]: row["reasons"] for row in rows_of(tmp_path / "rejected_queries.jsonl")} == {
        "chinese": ["shares 13 words in a row with a benchmark"],
        "copied": ["shares 13 words in a row with a benchmark"],
        "mail": ["a secret or an e-mail address"],
        "again": ["nearly the same as another: own"],
    }
    assert "no such file" in refused(*flags, tmp_path / "nowhere")


# ---- real-world queries ----

REAL = """---
domain: research
licence: CC0-1.0
workspace: data
check: test -f out.txt
solution: echo 2 > out.txt
---
Fit the curve in data.csv and write the slope to out.txt.
"""


def real_folder(tmp_path, **texts):
    folder = tmp_path / "real"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "data.csv").write_text("1,2\n")
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text)
    return folder


@needs_bwrap
def test_real_queries_are_proven_selected_and_read_back(tmp_path):
    turns = (
        "---\nquery_id: two\ndomain: vibe_coding\nturns:\n- query: Draw a board\n  rubric: [a board shows]\n"
        "- query: Let two people play\n  check: ./play\n---\n"
    )
    folder = real_folder(
        tmp_path,
        fit=REAL,
        two=turns,
        idle=REAL.replace("-f out.txt", "-f data.csv").replace("solution: echo 2 > out.txt\n", ""),
        wrong=REAL.replace("2 > out.txt", "2"),
    )
    output = tmp_path / "out" / "queries.jsonl"
    told = run("--real", folder, "--output_file", output)
    assert "--n_real 60, but only 2 can be had" in told and "verify: 2 of 4 pass (real)" in told
    assert rows_of(output) == [
        {
            "query_id": "fit",
            "domain": "research",
            "subdomain": "",
            "source": "real",
            "workspace": "workspaces/fit",
            "turns": [
                {
                    "query": "Fit the curve in data.csv and write the slope to out.txt.",
                    "check": "test -f out.txt",
                    "solution": "echo 2 > out.txt",
                }
            ],
            "meta": {"licence": "CC0-1.0"},
        },
        {
            "query_id": "two",
            "domain": "vibe_coding",
            "subdomain": "",
            "source": "real",
            "meta": {},
            "turns": [
                {"query": "Draw a board", "rubric": ["a board shows"]},
                {"query": "Let two people play", "check": "./play"},
            ],
        },
    ]
    assert {
        row["query_id"]: row["reasons"] for row in rows_of(tmp_path / "out" / "rejected_queries.jsonl")
    } == {
        "idle": ["its check passes on the untouched workspace"],
        "wrong": ["its check fails after its own solution"],
    }
    assert (output.parent / "workspaces" / "fit" / "data.csv").read_text() == "1,2\n"
    assert json.loads((output.parent / "queries.settings.json").read_text())["settings"]["real"] == str(
        folder
    )
    evaluation = importlib.import_module("04_eval")  # what 01 writes, 04 reads
    assert len(evaluation.read_tasks(evaluation.Settings(tasks=[str(output)], feedback="judge"), {})) == 2
    assert "queries: 2\n" in run("--real", output, "--output_file", tmp_path / "again" / "queries.jsonl")


def test_a_task_line_with_every_field_comes_through(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "venv").mkdir()
    task = {
        "query_id": "a@b#1.c-d",
        "domain": "vibe_coding",
        "subdomain": "ui",
        "source": "somewhere",
        "turns": [{"query": "Say hello", "check": "c", "rubric": ["polite"], "solution": "s"}],
        "private": "private",
        "venv": "venv",
        "system": "You are kind.",
        "image": "debian",
        "needs": ["git"],
        "tools": [{"type": "function", "function": {"name": "bash"}}],
        "meta": {"split": "train"},
    }
    (tmp_path / "real.jsonl").write_text(json.dumps(task) + "\n")
    run("--real", tmp_path / "real.jsonl", "--output_file", tmp_path / "out" / "q.jsonl", "--verify_runs", 0)
    [row] = rows_of(tmp_path / "out" / "q.jsonl")
    assert row == task | {"private": "private/a@b#1.c-d", "venv": "../venv"}


@pytest.mark.parametrize(
    "change, message",
    [
        (("check: test -f out.txt\n", ""), "turn needs a check"),
        (("check:", "chek:"), "chek: Extra inputs"),
        (("domain: research", "domain: cooking"), "domain: Input should be 'vibe_coding' or 'research'"),
        (("---\ndomain", "---\nquery_id: ..\ndomain"), "query_id: String should match"),
        (("workspace: data", "workspace: other"), "other does not exist"),
        (("---\ndomain", "domain"), "front matter"),
        (("licence: CC0-1.0", "licence: ["), "one.md"),
        (("workspace: data", "workspace: data/data.csv"), "data.csv is neither a folder nor a .tar"),
        (("licence: CC0-1.0", "2: x"), "cannot be written as JSON: "),
        (("licence: CC0-1.0", "meta: &m {own: *m}"), "cannot be written as JSON: "),
        (("---\ndomain", f"---\nquery_id: {'x' * 151}\ndomain"), "query_id: String should match"),
        (("check: test -f out.txt", "check: ' '"), "turns.0.check: String should match pattern"),
        (("licence: CC0-1.0", "licence: CC0-1.0\nmeta: x"), "licence: Extra inputs"),
        (("workspace: data", "workspace: ''"), "workspace: String should have at least 1"),
    ],
)
def test_all_bad_real_queries_of_a_folder_are_named(tmp_path, change, message):
    folder = real_folder(tmp_path, one=REAL.replace(*change), two="no front matter", three=REAL)
    lines = refused("--real", folder, "--output_file", tmp_path / "queries.jsonl").splitlines()
    assert len(lines) == 2 and "one.md" in lines[0] and message in lines[0] and "two.md" in lines[1]
    assert not (tmp_path / "queries.jsonl").exists()


def test_a_folder_may_hold_markdown_and_lines_and_names_what_is_neither(tmp_path, capsys):
    folder = real_folder(tmp_path, fit=REAL)
    row = {"query_id": "two", "domain": "research", "turns": [{"query": "q", "check": "x"}]}
    (folder / "more.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "notes.txt").write_text("Nothing.")
    assert [row["query_id"] for row in stage.real_queries(folder)] == ["fit", "two"]
    assert capsys.readouterr().out == f"left out: {folder}/notes.txt: neither *.md nor *.jsonl\n"
    (folder / "more.jsonl").write_text('{"query_id": "two"}\n{"query_id"\n')
    lines = refused("--real", folder, "--output_file", tmp_path / "queries.jsonl").splitlines()
    assert "more.jsonl:1: domain" in lines[0] and "more.jsonl:2: not valid JSON" in lines[1]


def test_a_query_id_counts_once(tmp_path):
    file, graded = tmp_path / "r.jsonl", {"query_id": "a", "domain": "research"}
    file.write_text(
        "".join(
            json.dumps(graded | {"turns": [{"query": query, "rubric": ["x"]}]}) + "\n"
            for query in ("sort the names", "draw a circle")
        )
    )
    run("--real", file, "--output_file", tmp_path / "queries.jsonl")
    [row] = rows_of(tmp_path / "rejected_queries.jsonl")
    assert row["reasons"] == ["its query_id is taken"] and row["turns"][0]["query"] == "draw a circle"


@needs_bwrap
def test_own_queries_come_from_any_editor_and_one_that_cannot_be_run_stops_no_other(tmp_path):
    """A byte order mark, line ends of Windows, two files of one id, a query in Chinese."""
    folder = real_folder(tmp_path, two=REAL.replace("---\ndomain", "---\nquery_id: fit\ndomain"))
    text = REAL.replace("Fit the curve in data.csv", "請把曲線擬合到資料上").replace("---", "--- ")
    (folder / "fit.md").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    output = tmp_path / "out" / "queries.jsonl"
    run("--real", folder, "--output_file", output)
    [row] = rows_of(output)
    assert row["turns"][0]["query"].startswith("請把曲線") and row["turns"][0]["check"] == "test -f out.txt"
    [row] = rows_of(tmp_path / "out" / "rejected_queries.jsonl")
    assert row["reasons"] == ["its query_id is taken"] and "Fit" in row["turns"][0]["query"]


def test_a_task_that_04_refuses_is_found_among_the_others(tmp_path, monkeypatch):
    def agents(folder, tasks, runs):
        if any(task["query_id"] == "d" for task in tasks):
            raise stage.InputError("tools: no such tool")
        unsolved = {task["query_id"]: [{"meta": {"solved": False}}] for task in tasks}
        return {"nothing": unsolved, "solution": unsolved}, {}

    monkeypatch.setattr(stage, "run_agents", agents)
    rows = [task(name, name) for name in "abcde"]
    stage.verify_real(tmp_path, rows)
    assert [row["reasons"] for row in rows] == [[], [], [], ["04 refuses it: tools: no such tool"], []]


def test_a_workspace_that_holds_the_output_is_refused(tmp_path):
    folder = real_folder(tmp_path, one=REAL.replace("workspace: data", "workspace: ."))
    line = refused("--real", folder, "--output_file", folder / "out" / "q.jsonl", "--verify_runs", 0)
    assert "this workspace holds the output" in line


@pytest.mark.parametrize("place", ["workspaces/one/tree", "workspaces/two"])
def test_a_given_folder_is_never_replaced_by_another(tmp_path, place):
    """In the way of a task's own folder lies another task's, or its own below it."""
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "data.csv").write_text("1,2")
    (tmp_path / "elsewhere").mkdir()
    turns = [{"query": "q", "rubric": ["r"]}]
    rows = [{"query_id": "one", "domain": "research", "workspace": place, "turns": turns}]
    rows.append(rows[0] | {"query_id": "two", "workspace": "elsewhere", "turns": [turns[0] | {"query": "z"}]})
    stage.write_jsonl(tmp_path / "real.jsonl", rows)
    line = refused("--real", tmp_path / "real.jsonl", "--output_file", tmp_path / "queries.jsonl")
    assert "would take the place of a given folder" in line
    assert (tmp_path / place / "data.csv").read_text() == "1,2"


def test_bad_jsonl_and_folders(tmp_path):
    flags = "--output_file", tmp_path / "queries.jsonl", "--real"
    good = {"query_id": "a", "domain": "research", "turns": [{"query": "q", "check": "x"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(good) + '\n{"a"')
    assert "r.jsonl:2: not valid JSON" in refused(*flags, tmp_path / "r.jsonl")
    (tmp_path / "empty").mkdir()
    assert "no query in it" in refused(*flags, tmp_path / "empty")


# ---- select ----


def task(query_id, query, domain="vibe_coding", **meta):
    return {"query_id": query_id, "domain": domain, "turns": [{"query": query}], "meta": meta, "reasons": []}


def test_diverse_takes_unlike_queries_and_smaller_choices_are_beginnings():
    rows = [
        task("a", "sort the list of names"),
        task("b", "sort the list of words"),
        task("c", "draw a red circle"),
        task("d", "plot the decay", "research"),
    ]
    order = [row["query_id"] for row in stage.diverse(rows, 4, 4)]
    assert order == ["a", "d", "c", "b"]  # the other domain first, then the query that is least like a
    for n in range(4):
        assert [row["query_id"] for row in stage.diverse(rows, n, 4)] == order[:n]


def test_quota_of_a_repository_and_difficulty():
    rows = [
        task("a", "one", repo="x", difficulty="easy"),
        task("b", "two", repo="x", difficulty="hard"),
        task("c", "three", repo="x", difficulty="hard"),
        task("d", "four", repo="y", difficulty="easy"),
    ]
    assert [row["query_id"] for row in stage.diverse(rows, 9, 2)] == ["b", "c", "d"]


def test_every_beginning_of_the_output_has_the_same_mixture():
    real = [task(f"real{i}", f"real {i}") for i in range(6)]
    pulls = [task(f"pr{i}", f"pull {i}") for i in range(3)]
    assert "".join(row["query_id"][0] for row in stage.interleave([real, pulls])) == "rprrprrpr"


def review(query_id, reviewer, decision, at, **more):
    return {"query_id": query_id, "reviewer": reviewer, "decision": decision, "at": at} | more


def test_reviews_count_and_an_edit_outlives_an_accept_without_one(tmp_path, capsys):
    rows = [task(name, f"query {name}") for name in "pqrs"]
    stage.write_jsonl(
        tmp_path / "reviews.jsonl",
        [
            review(
                "p",
                "ada",
                "accept",
                "1",
                edit={"queries": ["edited"], "domain": "research", "rubric": ["kept"]},
            ),
            review("p", "ben", "accept", "2"),
            review("q", "ada", "accept", "3"),
            review("q", "ben", "reject", "4", reason="vague"),
            review("q", "eve", "accept", "5"),
            review("r", "ada", "reject", "6", reason="too early"),
            review("r", "ada", "accept", "7"),
        ],
    )
    stage.apply_reviews(rows, tmp_path / "reviews.jsonl", "any")
    assert [row["reasons"] for row in rows] == [[], ["rejected by a reviewer: vague"], [], []]
    assert rows[0]["turns"] == [{"query": "edited", "rubric": ["kept"]}] and rows[0]["domain"] == "research"
    rows = [task(name, f"query {name}") for name in "pqrs"]
    stage.apply_reviews(rows, tmp_path / "reviews.jsonl", "majority")
    assert [row["reasons"] for row in rows] == [[], [], [], []]
    assert "review: 3 tasks decided, 2 by two or more; Krippendorff's alpha" in capsys.readouterr().out


@pytest.mark.parametrize(
    "units, alpha",
    [
        ([["a", "a"], ["a", "a"]], 1.0),  # nobody differs: defined
        # By hand, aa ar rr ar: observed = (0 + 2 + 0 + 2) / 1 = 4; 4 a and 4 r: expected = (64 - 32) / 7.
        ([["a", "a"], ["a", "r"], ["r", "r"], ["a", "r"]], 1 - 4 / (32 / 7)),
        ([["a"], ["r", "r"], ["a", "a"]], 1.0),
    ],
)
def test_agreement_by_hand(units, alpha):
    assert stage.agreement(units)[0] == pytest.approx(alpha)


def test_a_reviewers_edit_goes_through_the_rules(small_repo, tmp_path):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 2\n"}, "Two (#7)")
    row = written(repo, GOOD)
    stage.write_jsonl(
        tmp_path / "r.jsonl", [review("small-7", "ada", "accept", "1", edit={"queries": ["fix a.py"]})]
    )
    stage.apply_reviews([row], tmp_path / "r.jsonl", "any")
    assert row["reasons"] == ["shorter than 40 words", "names the file to change: a.py"]


def test_a_reviewers_edit_of_a_chain_may_not_give_away_any_of_its_turns(small_repo, tmp_path):
    repo, commit = small_repo
    commit({"a.py": "x = 2\n", "test_a.py": "# 1\n"}, "Two (#1)")
    commit({"a.py": "x = 3\n", "test_a.py": "# 2\n"}, "Three (#2)")
    parts = mined(repo)[::-1]
    turns = [{"query": GOOD, "check": "c"}, {"query": GOOD, "check": "c"}]
    chain = stage.without(parts[0], "tree", "material") | {"query_id": "c", "parts": ["small-1", "small-2"]}
    chain |= {"turns": turns, "reasons": []}
    for part in parts:
        part["reasons"] = ["a turn of c"]
    edit = {"queries": [GOOD, GOOD + " Look at a.py."]}
    stage.write_jsonl(tmp_path / "r.jsonl", [review("c", "ada", "accept", "1", edit=edit)])
    stage.apply_reviews([*parts, chain], tmp_path / "r.jsonl", "any")
    assert chain["reasons"] == ["names the file to change: a.py"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reviewer": None}, "r.jsonl:1: reviewer: Input should be a valid string"),
        ({"decision": "perhaps"}, "r.jsonl:1: decision: Input should be 'accept' or 'reject'"),
        ({"edit": "better"}, "r.jsonl:1: edit: Input should be a valid dictionary"),
        ({"edit": {"queries": "better"}}, "r.jsonl:1: edit.queries: Input should be a valid list"),
        ({"edit": {"domain": "cooking"}}, "r.jsonl:1: edit.domain: Input should be 'vibe_coding' or"),
    ],
)
def test_a_review_made_by_hand_says_what_is_wrong_with_it(tmp_path, change, message):
    stage.write_jsonl(tmp_path / "r.jsonl", [review("a", "ada", "accept", "1") | change])
    with pytest.raises(stage.InputError) as error:
        stage.decisions(tmp_path / "r.jsonl")
    assert message in str(error.value)


def test_a_reviewer_who_empties_the_rubric_leaves_no_task_that_nothing_decides(tmp_path):
    checked, judged = [{"query": "do a", "check": "c", "rubric": ["x"]}], [{"query": "do b", "rubric": ["x"]}]
    rows = [task("a", "") | {"turns": checked}, task("b", "") | {"turns": judged}]
    edits = [review(name, "ada", "accept", "1", edit={"rubric": []}) for name in "ab"]
    stage.write_jsonl(tmp_path / "r.jsonl", edits)
    stage.apply_reviews(rows, tmp_path / "r.jsonl", "any")
    assert [row["reasons"] for row in rows] == [[], ["neither a check nor a rubric"]]
    assert rows[0]["turns"] == [{"query": "do a", "check": "c"}]  # 04 refuses an empty list


# ---- files that are only appended to ----


def append_many(path, writer):
    for number in range(180):
        stage.append_jsonl(path, {"writer": writer, "number": number})


def test_four_processes_that_write_at_once_lose_no_line(tmp_path):
    for attempt in range(5):
        path = tmp_path / f"{attempt}.jsonl"
        path.write_text('{"cut by a ki')
        writers = [Process(target=append_many, args=(path, writer)) for writer in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        expected = []
        for writer in range(4):
            expected += [(writer, number) for number in range(180)]
        assert sorted((row["writer"], row["number"]) for row in rows_of(path)) == expected
