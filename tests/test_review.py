"""recipes/review.py: what reviewers decide is stored and counts; the page works with keys and a mouse."""

import http.client
import importlib
import json
import multiprocessing
import subprocess
import sys
import threading

import pytest
from chromium import Browser, find_chromium
from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
EVIL = "</script><script>document.title = 'ran'</script>\u2028<img src=x onerror=alert(1)>{{ 7 * 6 }}"
DIFF = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-old\n+new\n same\n"


@pytest.fixture(scope="module")
def review():
    return importlib.import_module("review")


@pytest.fixture(scope="module")
def decisions():
    return importlib.import_module("decisions")


def task(name, *queries, **more):
    turns = [{"query": query, "check": "true"} for query in queries or [f"do {name}"]]
    turns[0]["rubric"] = ["it runs", "it is fast"]
    material = {"text": "Title: fix", "secret": DIFF, "tests": DIFF}
    row = {"query_id": name, "domain": "vibe_coding", "source": "pr", "turns": turns, "material": material}
    return row | {"meta": {"title": "fix"}, "reasons": []} | more


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def desk(review, tmp_path):
    """desk(*tasks, reviewers=...) -> the desk of these reviewers, all of whom see every task."""

    def make(*tasks, reviewers=("ada", "ben")):
        return review.Desk(list(tasks), tmp_path / "reviews.jsonl", dict.fromkeys(reviewers), len(reviewers))

    return make


# ---- What is stored, and what it means ----


def write_many(path, writer):
    decisions = importlib.import_module("decisions")
    for number in range(180):
        decisions.store(path, {"query_id": f"{number}", "reviewer": writer, "note": "x" * 500})


def test_reviews_of_four_processes_are_all_stored(tmp_path):
    path = tmp_path / "reviews.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, f"reviewer {n}")) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stored = {(record["query_id"], record["reviewer"]) for record in read_lines(path)}
    assert len(stored) == len(read_lines(path)) == 720


def test_a_line_that_a_kill_cut_short_is_cut_off_and_nothing_else(decisions, tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_bytes(b'{"query_id": "a"}\n{"query_id": "b", "rev')
    decisions.store(path, {"query_id": "c"})
    assert read_lines(path) == [{"query_id": "a"}, {"query_id": "c"}]


def test_an_accept_without_an_edit_leaves_anothers_edit(desk, decisions):
    one = desk(task("a", "first", "second"))
    one.take(
        "ada",
        1,
        {"decision": "accept", "queries": {"0": "better"}, "rubric": ["it runs"], "domain": "research"},
    )
    one.take("ben", 1, {"decision": "accept", "note": ""})
    found, edits = decisions.read_reviews(one.path)
    assert "edit" not in found["a"]["ben"]
    row = decisions.edited(one.items[0], edits["a"])
    assert [turn["query"] for turn in row["turns"]] == ["better", "second"]
    assert row["turns"][0]["rubric"] == ["it runs"] and row["domain"] == "research"


def test_edits_of_different_turns_meet(desk, decisions):
    one = desk(task("a", "first", "second"))
    one.take("ada", 1, {"decision": "accept", "queries": {"0": "better"}})
    one.take("ben", 1, {"decision": "accept", "queries": {"1": "best"}})  # from a page that showed "first"
    _, edits = decisions.read_reviews(one.path)
    row = decisions.edited(one.items[0], edits["a"])
    assert [turn["query"] for turn in row["turns"]] == ["better", "best"]


def test_a_stored_line_has_the_fields_that_select_reads(desk):
    one = desk(task("a"))
    one.take(
        "ada", 1, {"decision": "reject", "reason": "other", "note": "too long", "queries": {"0": "short"}}
    )
    [line] = read_lines(one.path)
    assert line.pop("at").startswith("20")
    said = {"decision": "reject", "reason": "other", "note": "too long", "edit": {"queries": ["short"]}}
    assert line == {"query_id": "a", "reviewer": "ada"} | said


@pytest.mark.parametrize("said, told", [
    ({"decision": "perhaps"}, "accept or reject"),
    ({"decision": "reject"}, "one of the reasons"),
    ({"decision": "reject", "reason": "other", "note": " "}, "note"),
    ({"decision": "accept", "queries": {"0": " "}}, "empty"),
])  # fmt: skip
def test_a_decision_that_says_too_little_is_not_stored(desk, review, said, told):
    one = desk(task("a"))
    with pytest.raises(review.InputError, match=told):
        one.take("ada", 1, said)
    assert not one.path.exists()


def test_every_item_has_as_many_reviewers_as_the_overlap(decisions):
    work = decisions.assign(range(12), ["ada", "ben", "cem", "dua"], 2)
    assert {name: len(numbers) for name, numbers in work.items()} == {"ada": 6, "ben": 6, "cem": 6, "dua": 6}
    pairs = [""] * 12
    for name, numbers in work.items():
        for number in numbers:
            pairs[number] += name
    assert len(set(pairs)) == 6 and all(pairs.count(pair) == 2 for pair in pairs)


def test_agreement_is_krippendorffs_alpha(decisions):
    # by hand: 8 values, 5 accept, 3 reject; observed 2 / 8, expected (64 - 25 - 9) / (8 * 7);
    # 1 - 0.25 / 0.5357
    alpha, n = decisions.agreement([["a", "a"], ["a", "r"], ["r", "r"], ["a", "a"], ["r"]])
    assert (round(alpha, 4), n) == (0.5333, 4)
    # Krippendorff's own example C without its missing values' units: three raters, one of three differs
    alpha, n = decisions.agreement([["a", "a", "r"]])
    assert (round(alpha, 4), n) == (0.0, 1)
    assert decisions.agreement([["a", "a"], ["a", "a", "a"]]) == (1.0, 2)  # nobody differs: defined
    assert decisions.agreement([["a"], []]) == (None, 0)


@pytest.mark.parametrize("letters, either, majority", [
    ("", None, None), ("a", True, True), ("r", False, False), ("ar", False, True), ("aar", False, True),
    ("arr", False, False),
])  # fmt: skip
def test_one_rejection_or_the_majority_decides(decisions, letters, either, majority):
    given = [{"decision": {"a": "accept", "r": "reject"}[letter]} for letter in letters]
    assert decisions.verdict(given, "any") is either
    assert decisions.verdict(given, "majority") is majority


def test_the_last_decision_of_a_reviewer_counts(desk, decisions):
    one = desk(task("a"))
    one.take("ada", 1, {"decision": "accept"})
    one.take("ada", 1, {"decision": "reject", "reason": "quality: vague"})
    found, _ = decisions.read_reviews(one.path)
    assert found["a"]["ada"]["decision"] == "reject" and len(read_lines(one.path)) == 2


def test_rows_of_one_task_are_decided_each_for_itself(desk, review):
    """As 04's several runs of a task leave them."""
    rows = [{"query_id": "a", "messages": [{"role": "user", "content": text}], "meta": {}} for text in "xy"]
    one = desk(*rows)
    one.take("ada", 1, {"decision": "accept", "note": ""})
    assert one.first_open("ada") == 2
    one.take("ada", 2, {"decision": "reject", "reason": review.ROW_REASONS[0]})
    assert review.report(rows, one.path, "any") == rows[:1]
    assert [record["query_id"] for record in read_lines(one.path)] == ["a", "a.2"]


def test_what_the_page_makes_visible_is_stored_as_it_was(desk):
    one = desk(task("a", "left\u200bright"))
    assert "left⟨U+200B⟩right" in one.page("ada", 1)
    said = {"queries": {"0": "left⟨U+200B⟩wrong ⟨U+D800⟩"}, "rubric": ["⟨U+202E⟩runs"]}
    one.take("ada", 1, said | {"decision": "accept"})
    edit = {"rubric": ["\u202eruns"], "queries": ["left\u200bwrong ⟨U+D800⟩"]}
    assert read_lines(one.path)[0]["edit"] == edit


def test_a_reviewer_named_twice_is_one(review, tmp_path, monkeypatch):
    monkeypatch.setattr(review, "serve", lambda desk, port: desks.append(desk))
    desks = []
    path = write_lines(tmp_path / "tasks.jsonl", [task("a"), task("b")])
    review.main([str(path), "--reviewers", "ada", "ada"])
    assert desks[0].work == {"ada": [0, 1]}


def test_what_stays_is_written_with_its_edits(tmp_path):
    rows = [{"query_id": name, "messages": [{"role": "user", "content": name}], "meta": {}} for name in "abc"]
    path = write_lines(tmp_path / "train.jsonl", rows)
    said = [("a", "ada", "accept"), ("a", "ben", "accept"), ("b", "ada", "reject"), ("b", "ben", "accept")]
    lines = [
        {"query_id": name, "reviewer": who, "decision": what, "at": str(n)}
        for n, (name, who, what) in enumerate(said)
    ]
    lines[0]["edit"] = {"domain": "research"}
    write_lines(tmp_path / "train.reviews.jsonl", lines)
    command = [sys.executable, ROOT / "recipes/review.py", path, "--accepted", tmp_path / "kept.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True)
    # by hand: 4 values, 3 accept, 1 reject; observed 2 / 4, expected (16 - 9 - 1) / (4 * 3)
    assert "accepted: 1\nrejected: 1 (any of the reviewers)\nopen: 1\n" in result.stdout
    assert "Krippendorff's alpha 0.00 over 2 items" in result.stdout
    assert read_lines(tmp_path / "kept.jsonl") == [rows[0] | {"meta": {"domain": "research"}}]
    result = subprocess.run([*command, "--reject", "majority"], capture_output=True, text=True)
    assert [row["query_id"] for row in read_lines(tmp_path / "kept.jsonl")] == ["a", "b"]


def test_a_mistake_is_told_in_one_line(one_line_error, tmp_path):
    def run(path, *flags):
        command = [sys.executable, ROOT / "recipes/review.py", path, *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    one_line_error(run(tmp_path / "none.jsonl"), "none.jsonl")
    one_line_error(run(write_lines(tmp_path / "x.jsonl", [{"query_id": "a"}])), "x.jsonl:1", "neither turns")
    one_line_error(run(write_lines(tmp_path / "x.jsonl", [task("a", reasons=["vague"])])), "nothing")
    path = write_lines(tmp_path / "x.jsonl", [task("a")])
    write_lines(tmp_path / "reviews.jsonl", [{"query_id": "a", "decision": "accept"}])
    one_line_error(run(path, "--accepted", tmp_path / "y.jsonl"), "reviews.jsonl:1: no reviewer")


# ---- The page ----


@pytest.fixture
def served(review, tmp_path):
    """served(tasks) -> ({reviewer: address}, file of the decisions), for ada and ben."""
    servers = []

    def start(tasks, name="reviews.jsonl"):
        desk = review.Desk(tasks, tmp_path / name, ["ada", "ben"], 2)
        server = review.make_server(desk, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_port}"
        return {who: f"{address}/{secret}" for secret, who in desk.reviewers.items()}, desk.path

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("needs chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def at(tab, place):
    tab.wait(f"location.pathname.endsWith('/{place}') && document.readyState === 'complete'")


def test_the_page_takes_decisions_of_its_own_pages_only(served):
    addresses, path = served([task("a")])
    host, _, secret = addresses["ada"].removeprefix("http://").partition("/")

    def ask(method, place, body=None, **headers):
        connection = http.client.HTTPConnection(host)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, place, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()

    accept = json.dumps({"decision": "accept"})
    assert ask("GET", "/wrong/1")[0] == 403
    assert ask("POST", "/wrong/1", accept)[0] == 403
    assert ask("POST", f"/{secret}/1", accept, Origin="http://evil.example")[0] == 403
    assert ask("POST", f"/{secret}/1", accept, Host="evil.example")[0] == 403
    assert ask("POST", f"/{secret}/2", accept)[0] == 403
    for body in ("", "[]", "{", '{"decision": "accept", "queries": {"9": "x"}}'):
        assert ask("POST", f"/{secret}/1", body)[0] == 400
    assert not path.exists()
    assert ask("POST", f"/{secret}/1", accept) == (200, "")
    assert [line["reviewer"] for line in read_lines(path)] == ["ada"]


def test_two_annotators_one_with_keys_one_with_a_mouse(served, browser):
    addresses, path = served([task("a"), task("b"), task("c", EVIL)])
    ada = browser.tab()
    ada.look(1400)
    ada.open(addresses["ada"])
    at(ada, 1)
    assert ada.run("[...document.querySelectorAll('.diff div')].slice(0, 6).map(e => e.className)") == [
        "file", "file", "place", "removed", "added", "same"]  # fmt: skip

    ada.press("a", repeat=True)  # a key held down decides nothing
    ada.press("e")
    ada.write("Please, ")
    ada.press("a")  # in a text a key is a letter
    assert ada.run("document.activeElement.value").count("Please, ") == 1
    ada.press("Escape")
    ada.open(addresses["ada"] + "/1")  # a reload loses nothing
    assert "Please, " in ada.run("document.querySelector('[name=query]').value")
    assert ada.run("document.getElementById('state').textContent") == "changed, not stored yet"
    assert not path.exists()
    ada.press("a")
    at(ada, 2)
    ada.press("r")
    ada.press("8")  # other, which needs a note
    ada.wait("document.getElementById('problem').textContent.includes('note')")
    assert ada.run("document.activeElement.id") == "note"
    ada.write("too easy")
    ada.press("Escape")
    ada.press("8")
    at(ada, 3)
    ada.press("u")
    at(ada, 2)
    assert ada.run("document.getElementById('state').textContent") == "you reject: other"
    assert ada.run("document.getElementById('note').value") == "too easy"
    ada.press("ArrowRight")
    at(ada, 3)
    ada.press("d")
    ada.press("a")
    ada.wait("document.getElementById('state').textContent === 'you accept'")

    ben = browser.tab()
    ben.look(400)
    ben.open(addresses["ben"])
    at(ben, 1)
    assert "Please, " in ben.run("document.querySelector('[name=query]').value")
    assert "as edited by ada" in ben.run("document.body.innerText")
    assert ben.run("document.getElementById('state').textContent") == "open"  # nobody sees another's decision
    ben.click("#accept")
    at(ben, 2)
    ben.click("#back")
    at(ben, 1)
    ben.click("#forth")
    at(ben, 2)
    ben.click("[data-reason='quality: trivial']")
    at(ben, 3)
    ben.click("#undo")
    at(ben, 2)
    ben.open(addresses["ben"] + "/3")
    assert ben.run("document.title") != "ran"
    assert "{{ 7 * 6 }}" in ben.run("document.querySelector('[name=query]').value")
    assert ben.too_wide() == []
    ben.click("[data-reason='does not match the pull request']")
    ben.wait("document.getElementById('state').textContent.startsWith('you reject')")
    assert ben.run("document.querySelector('progress').value") == 3

    lines = [
        (line["reviewer"], line["query_id"], line["decision"], line.get("reason"))
        for line in read_lines(path)
    ]
    assert lines == [
        ("ada", "a", "accept", None), ("ada", "b", "reject", "other"), ("ada", "c", "accept", None),
        ("ben", "a", "accept", None), ("ben", "b", "reject", "quality: trivial"),
        ("ben", "c", "reject", "does not match the pull request"),
    ]  # fmt: skip
    edits = [line.get("edit") for line in read_lines(path)]
    assert edits[0] == {"queries": ["Please, ado a"]}
    assert edits[1] is None and edits[2] == {"domain": "research"} and edits[3:] == [None] * 3
    assert browser.errors == [
        error for error in browser.errors if "400" in error
    ]  # the note that was missing


def test_what_one_writes_while_another_edits_is_kept_and_told(served, browser):
    addresses, path = served([task("a", "first", "second")])
    ben = browser.tab()
    ben.open(addresses["ben"])
    at(ben, 1)
    ben.click("#query1")
    ben.write("more ")
    ada = browser.tab()
    ada.open(addresses["ada"])
    at(ada, 1)
    ada.click("#query0")
    ada.write("edited ")
    ada.click("#accept")
    ada.wait("document.getElementById('state').textContent === 'you accept'")
    ben.click("#accept")
    ben.wait("document.getElementById('state').textContent === 'you accept'")
    queries = read_lines(path)[-1]["edit"]["queries"]
    assert "edited " in queries[0] and "more " in queries[1]


def test_rows_are_reviewed_as_the_conversation_they_are(served, browser, review):
    talk = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": "done"}]
    addresses, path = served(
        [{"query_id": "r", "messages": talk, "meta": {"domain": "research"}}], "x.reviews.jsonl"
    )
    tab = browser.tab()
    tab.look(400, dark=True)
    tab.open(addresses["ada"])
    at(tab, 1)
    assert tab.run("document.querySelectorAll('section').length") == 2 and tab.too_wide() == []
    tab.press("r")
    tab.press("1")
    tab.wait("document.getElementById('state').textContent.startsWith('you reject')")
    assert read_lines(path)[0]["reason"] == review.ROW_REASONS[0]
