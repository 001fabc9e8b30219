"""recipes/view.py and recipes/plot.py: pages of rows, trained tokens, episodes and comparisons."""

import html.parser
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import Browser, find_chromium
from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
TAG, QUOTE = "<script>document.title = 'ran'</script>", '"><img src=x onerror=alert(1)>'
EVIL = TAG + QUOTE + "{{ 7 * 6 }}\x1b[31m\u202eabc"
LONG = "y" * 15_000 + "x" * 15_000
VIEW, PLOT = ROOT / "recipes/view.py", ROOT / "recipes/plot.py"


@pytest.fixture(scope="module")
def view():
    return importlib.import_module("view")


@pytest.fixture(scope="module")
def plot():
    return importlib.import_module("plot")


def call(number, name, **arguments):
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- What the stages leave, small and hostile ----


def conversation(text="a task"):
    calls = [
        call(1, "read_file", absolute_path="/workspace/a.py", limit=20),
        call(2, "run_shell_command", command="ls -la\npwd", description="Look around"),
        call(3, "replace", file_path="/workspace/a.py", old_string="x = 1", new_string="x = 2"),
        call(4, "write_file", file_path="/workspace/b.py", content="line 1\nline 2", mode=None),
    ]
    return [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": text},
        {"role": "assistant", "content": "I look.", "reasoning_content": "thinking", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "first output"},
        {"role": "tool", "tool_call_id": "c2", "content": LONG},
        {"role": "assistant", "content": "done"},
    ]


def hostile(messages):
    """The same conversation with markup, template language and unseen characters in every text."""
    evil = EVIL + "\ud800"
    messages = json.loads(json.dumps(messages))
    for message in messages:
        message["content"] = evil
        if message["role"] == "assistant":
            message["reasoning_content"] = evil
        for each in message.get("tool_calls", []):
            each["function"] = {
                "name": evil,
                "arguments": {evil: evil, "command": evil, "content": evil + "\n"},
            }
    return messages


def make_rows(folder):
    rows = []
    for number in range(12):
        meta = {"format": "sii", "source": f"logs/{number}.json", "n_tokens": 1000 * (number + 1)}
        meta["domain"] = "research" if number % 3 else "vibe_coding"
        messages = conversation() * (1 + number % 3)
        rows.append({"query_id": f"row-{number}", "messages": messages, "tools": [], "meta": meta})
    rows[3]["query_id"] = rows[3]["meta"]["domain"] = rows[3]["meta"]["source"] = EVIL
    rows[3]["messages"] = hostile(rows[3]["messages"])
    rows[3]["tools"] = [{"name": EVIL}]
    rejects = [
        {"source": f"logs/x{n}.json", "reasons": ["no_answer", f"unknown_kind: {EVIL}"]} for n in range(2)
    ]
    rejects.append({"source": "logs/y.json", "reasons": ["no_answer"]})
    write_lines(folder / "train.rejected.jsonl", rejects)
    return write_lines(folder / "train.jsonl", rows)


def make_trained(folder):
    """A tokenizer of bytes with two special tokens, three samples, the log of a training run."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))

    def sample(name, *parts):
        ids, labels = [], []
        for text, trained in parts:
            new = tokenizer.encode(text, add_special_tokens=False).ids
            ids += new
            labels += new if trained else [-100] * len(new)
        return {"query_id": name, "input_ids": ids, "labels": labels}

    head = "<|im_start|>user\n" + "schema " * 400 + "<|im_end|>\n<|im_start|>assistant\n"
    samples = [
        sample(
            "two", (head, False), ("Grüße 🙂<|im_end|>", True), ("\nagain\n", False), ("yes<|im_end|>", True)
        ),
        sample("cut", ("ask\n", False), ("no end", True)),
        sample(EVIL, ("ask\n", False), (EVIL + "<|im_end|>", True)),
    ]
    write_lines(folder / "tokenized.jsonl", samples)
    log = [{"step": n, "loss": str(2 / n), "learning_rate": 1e-5 * n} for n in range(1, 9)]
    folder.joinpath("recipe.json").write_text(json.dumps({"log": log}))
    return folder


def episode(task, run, scores, messages=None, **meta):
    """An episode whose rounds have these scores; its feedback is the next round's user message."""
    messages = messages or conversation(f"do {task}")
    records = []
    for number, score in enumerate(scores, 1):
        feedback = "" if score == 1 else f"not yet, {number}"
        check = {"requirement": "it runs", "passed": score == 1}
        record = {"turn": 0, "round": number, "stop": "answer", "score": score}
        records.append(record | {"checks": [check], "feedback": feedback})
        if number < len(scores):
            messages = [
                *messages,
                {"role": "user", "content": feedback},
                {"role": "assistant", "content": "again"},
            ]
    stats = dict.fromkeys(("steps", "tool_calls", "parse_errors", "prompt_tokens", "completion_tokens"), 2)
    meta = {"model": "m", "domain": "research", "solved": scores[-1] == 1, "seconds": 572.01} | stats | meta
    return {"query_id": task, "run": run, "messages": messages, "tools": [], "meta": meta, "rounds": records}


def make_results(folder, episodes, by_task, **more):
    """A results folder as a run leaves it. by_task: {task: (FTFC, SR@3, RC@3)}."""
    keys = ("FTFC", "SR@3", "RC@3")
    metrics = {}
    for key, values in zip(keys, zip(*by_task.values())):
        metrics |= {key: sum(values) / len(values), f"{key}_ci": [0.1, 0.9]}
    summary = {
        "model": str(folder / "model"),
        "settings": {"rounds": 3, "temperature": 0.0, "max_round_tokens": None},
        "fingerprints": {"tasks_sha256": "ab" * 32},
        "tasks": len(by_task),
        "episodes": len(episodes),
        "not_run": {},
        "task_sha256": dict.fromkeys(by_task, "cd" * 32),
        "sources": dict.fromkeys(by_task, "birds"),
        "metrics": metrics | {"seconds": 3725.0, "prompt_tokens": 123456},
        "by_task": {task: dict(zip(keys, values)) for task, values in by_task.items()},
    }
    write_lines(folder / "episodes.jsonl", episodes)
    folder.joinpath("summary.json").write_text(json.dumps(summary | more))
    return folder


def make_pair(folder):
    """base and tuned over the tasks a, b and c; `only` was scored in base alone, tuned did not run `lost`."""
    tasks = {"a": (0, 0, 0), "b": (0, 1, 2 / 3), "c": (1, 1, 1), "only": (1, 1, 1)}
    episodes = [
        episode("a", 0, [0, 0, 0]),
        episode("b", 0, [0, 1]),
        episode("c", 0, [1], hostile(conversation()), domain=EVIL, model=EVIL),
        episode("only", 0, [1]),
    ]
    episodes[2]["rounds"][0] |= {"feedback": EVIL, "checks": [{"requirement": EVIL, "passed": True}]}
    base = make_results(folder / "base", episodes, tasks)
    tasks = {"a": (0.5, 1, 2 / 3), "b": (1, 1, 1), "c": (1, 1, 1)}
    episodes = [episode("a", 0, [0.5, 1]), episode("b", 0, [1]), episode("c", 0, [1])]
    settings = {"rounds": 3, "temperature": 0.6, "max_round_tokens": None}
    tuned = make_results(folder / "tuned", episodes, tasks, trained_on=78, settings=settings)
    lost = {"query_id": "lost", "run": 0, "reason": "endpoint_error", "detail": EVIL}
    write_lines(tuned / "not_run.jsonl", [lost])
    return [base, tuned]


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: tags, links, text, the rows of its tables, the classes of its spans."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.links, self.text, self.rows = set(), set(), [], "", []
        self.spans, self.in_cell = [], False
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.in_cell = tag in ("td", "th") or (self.in_cell and tag not in ("tr", "h2"))
        if tag == "span":
            self.spans.append([dict(attributes).get("class"), ""])

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th", "table")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += " ".join(data.split())
        if self.spans:
            self.spans[-1][1] += data


@pytest.fixture(scope="module")
def pages(view, tmp_path_factory):
    """{name: folder of pages} of everything above, written once."""
    folder = tmp_path_factory.mktemp("pages")
    base, tuned = make_pair(folder / "results")
    inputs = {
        "rows": [make_rows(folder / "data")],
        "tokens": [make_trained(folder / "outputs/limi")],
        "episodes": [base],
        "comparison": [base, tuned],
    }
    return {name: view.view(paths, folder / name, 500).parent for name, paths in inputs.items()}


# ---- What the pages say ----


def test_rows_show_numbers_domains_and_what_was_rejected(pages):
    page = Page(pages["rows"] / "index.html")
    assert "12 rows of train.jsonl" in page.text
    # by hand: 12 rows of 1 to 12 thousand tokens
    assert "tokens 78,000 (median 6,500)" in " ".join(page.text.split())
    assert ["row-4", "research", "2", "12", "8", "5,000", "sii"] in page.rows
    assert ["no answer", "3"] in page.rows and ["unknown kind", "2"] in page.rows
    for title in ("Length, median 6,500", "Turns, median 2", "Tools", "Domains", "Rejected, by reason"):
        assert title in page.text  # of the pictures: their text is text


def test_a_conversation_reads_as_a_person_writes_it(pages):
    text = " ".join(Page(pages["rows"] / "0001.html").text.split())
    cut = "y" * 10_000 + " [… 10,000 characters left out of this page …] " + "x" * 10_000
    parts = [
        "row-0", "tokens 1,000", "system, 7 characters", "be good", "a task", "thought, 8 characters", "thinking",
        "I look.", "read_file /workspace/a.py, limit 20", "$ ls -la pwd", "run_shell_command, description Look around",
        "replace /workspace/a.py", "old string", "x = 1", "new string", "x = 2", "write_file /workspace/b.py, mode null",
        "content", "line 1 line 2", "read_file answered", "first output",
        "run_shell_command answered, 30,000 characters", cut, "done",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_names_that_cannot_be_drawn_or_seen_are_spelled(view, tmp_path):
    messages = conversation("a\U000e0041\xadb")
    messages[2]["tool_calls"] = [call(1, "\ud800")]
    row = {"query_id": "q", "messages": messages, "tools": None}
    row["meta"] = {"domain": "\udfff", "n_tokens": "12"}
    index = view.view([write_lines(tmp_path / "train.jsonl", [row])], tmp_path / "out", 500)
    text = Page(index).text
    assert "⟨U+D800⟩" in text and "⟨U+DFFF⟩" in text and "characters in a row" in text
    assert "a⟨U+E0041⟩⟨U+00AD⟩b" in Page(index.parent / "0001.html").text


def test_context_without_loss_is_named(view, tmp_path):
    messages = conversation()
    messages[2]["weight"] = 0
    path = write_lines(
        tmp_path / "train.jsonl", [{"query_id": "q", "messages": messages, "tools": None, "meta": {}}]
    )
    folder = view.view([path], tmp_path / "out", 500).parent
    assert Page(folder / "0001.html").text.count("context: no loss") == 1


def test_trained_tokens_are_coloured_as_the_labels_say(pages):
    page = Page(pages["tokens"] / "0001.html")
    shown = [span for span in page.spans if span[0] in ("context", "trained", "stop")][3:]  # after the legend
    assert [kind for kind, _ in shown[-5:]] == ["trained", "stop", "context", "trained", "stop"]
    assert [text.strip() for _, text in shown[-5:]] == [
        "Grüße 🙂",
        "<|im_end|>",
        "again",
        "yes",
        "<|im_end|>",
    ]
    assert (
        "more characters of context" in page.text
    )  # a page of schemas does not stand before the first green
    page = Page(pages["tokens"] / "index.html")
    assert "1 trained spans end without a stop token" in page.text
    assert ["cut", "10", "6", "60.0%", "1"] in page.rows


def test_what_02_rejects_is_shown_beside_its_rows(plot, run_stage, tmp_path):
    for name, text in (("good", "Done."), ("bad", None)):
        messages = [{"role": "user", "content": "Do it."}]
        messages += [{"role": "assistant", "content": text}] if text else []
        (tmp_path / f"{name}.json").write_text(json.dumps({"messages": messages}))
    rows = tmp_path / "rows" / "mine.jsonl"
    logs = [tmp_path / "good.json", tmp_path / "bad.json"]
    done = run_stage("02_format_trajectories.py", *logs, "--output_file", rows)
    assert done.returncode == 0, done.stderr
    assert [record["source"] for record in plot.read_rejects(rows)] == [str(logs[1])]


def test_a_dry_run_is_shown_with_the_bases_tokenizer(view, tmp_path):
    trained = make_trained(tmp_path / "limi")
    base = tmp_path / "base"
    base.mkdir()
    trained.joinpath("tokenizer.json").rename(base / "tokenizer.json")
    with pytest.raises(view.InputError, match="--tokenizer"):
        view.view([trained], None, 500)
    assert view.view([trained], None, 500, tokenizer=str(base)).exists()


def test_an_episode_shows_each_round_with_its_end_and_its_checks(pages):
    index = Page(pages["episodes"] / "index.html")
    assert ["b", "1", "✓ solved", "2", "2", "9 min 32 s", "answered"] in index.rows
    assert ["Solved within 3 rounds (SR@3)", "75.0%", "10.0% to 90.0%"] in index.rows
    assert ["Time of all episodes", "1 h 2 min", ""] in index.rows
    text = " ".join(Page(pages["episodes"] / "0002.html").text.split())
    parts = ["b, run 1 of base", "✓ solved", "Turn 1, round 1: 0% of the requirements met", "do b", "how it ended: answered",
             "✗ not met: it runs", "Turn 1, round 2: 100% of the requirements met", "not yet, 1", "✓ met: it runs"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.count("not yet, 1") == 1  # the feedback is the next user message, once
    assert "not yet, 3" in Page(pages["episodes"] / "0001.html").text  # of the last round: no message has it


def test_a_comparison_begins_with_what_differs(pages):
    page = Page(pages["comparison"] / "index.html")
    # by hand: average over a, b, c: base 0, 5/9, 1; tuned 13/18, 1, 1; differences 13/18, 4/9, 0
    average = next(row for row in page.rows if row[0].startswith("Average"))
    few = "(n = 3, too few for an interval)"
    assert average[1:3] == [f"51.9% {few}", f"90.7% {few}"] and average[3].startswith("+38.9%, p = ")
    tasks = [row for row in page.rows if row[0] in ("a", "b", "c")]
    assert tasks == [["a", "0%", "72%", "+72%"], ["b", "56%", "100%", "+44%"], ["c", "100%", "100%", "same"]]
    assert "without a score in one of them: only" in page.text
    assert ["settings temperature", "0.0", "0.6"] in page.rows and ["trained on", "–", "78"] in page.rows
    assert ["settings rounds", "3"] in page.rows and [
        "fingerprints tasks sha256",
        "abababababab…",
    ] in page.rows
    place = page.text.index
    assert (
        place("What differs between")
        < place("settings temperature")
        < place("What is the same")
        < place("settings rounds")
    )
    for end in ("png", "svg"):
        assert pages["comparison"].joinpath(f"compare.{end}").stat().st_size > 5000


def test_settings_that_differ_in_capitals_alone_differ(view, tmp_path):
    base, tuned = make_pair(tmp_path)
    for folder, model in ((base, "outputs/A"), (tuned, "outputs/a")):
        summary = json.loads(folder.joinpath("summary.json").read_text()) | {"model": model}
        folder.joinpath("summary.json").write_text(json.dumps(summary))
    rows = Page(view.view([base, tuned], tmp_path / "out", 500)).rows
    assert ["model", "outputs/A", "outputs/a"] in rows


def test_intervals_are_those_of_the_evaluation(view, plot, stage):
    values = [[0, 0.25, 0.5, 0.5, 1], [0.5, 0.5, 1, 1, 1]]
    [([name], means, [difference], published)] = view.paired({"FTFC": values}, {})
    low, high = stage("04_eval").bootstrap([0.5, 0.25, 0.5, 0.5, 0])
    assert name == "FTFC" and published == [] and means == [stage("04_eval").percent(run) for run in values]
    assert difference.startswith(f"+35.0% [{low:+.1%}, {high:+.1%}], p = ") and 0 <= low < high <= 0.5


def test_scores_that_are_the_same_stand_in_one_line(view):
    """With one round, one turn a task and one run there is one number, however many names it has."""
    names = ["FTFC", "SR@1", "RC@1", "pass^1", "pass@1"]
    metrics = {"seconds": 3}
    for name in names:
        metrics |= {name: 0.5, f"{name}_ci": [0.25, 0.75]}
        metrics[f"{name} over turns"] = 0.5
    scores, counts = view.split_metrics(metrics)
    assert scores == [(names, 0.5, [0.25, 0.75])] and counts == {"seconds": 3}
    assert view.split_metrics(metrics | {"FTFC over turns": 0.4})[0][1] == (["FTFC over turns"], 0.4, None)
    table = {"average": [[0, 1], [1, 1]], "FTFC": [[0, 1], [1, 1]], "RC@1": [[0, 0], [1, 1]]}
    assert [names for names, *_ in view.paired(table, {})] == [["FTFC", "average"], ["RC@1"]]
    words = importlib.import_module("pages").metric_names(["FTFC", "average"])
    assert words == "Requirements met in round 1 (FTFC); the same: average"


def test_the_sources_of_a_thousand_tasks_are_one_fact(view):
    sources = {"a": "HumanEval+", "b": "HumanEval+", "c": "DS-1000", "d": None}
    assert view.flatten({"sources": sources, "tasks": 4}) == {"sources": "DS-1000, HumanEval+", "tasks": 4}


def test_a_small_p_is_not_zero(view):
    assert [view.p_value(p) for p in (0.0004, 0.0005, 0.5)] == ["p < 0.001", "p = 0.001", "p = 0.500"]


def test_numbers_of_turns_have_a_tick_each(plot):
    from functools import partial

    panel = partial(plot.histogram, title="Turns", values=[1, 1, 2], unit="turns")
    (axis,) = plot.draw([panel]).axes
    assert list(axis.get_xticks()) == [1, 2]


def test_runs_with_other_rounds_are_compared_over_the_fewest(view, tmp_path):
    tasks = {"a": (0.5, 1, 2 / 3)}
    long = make_results(tmp_path / "long", [episode("a", 0, [0.5, 1])], tasks)
    short = make_results(tmp_path / "short", [episode("a", 0, [1])], {"a": (1, 1, 1)}, settings={"rounds": 1})
    summary = json.loads(short.joinpath("summary.json").read_text())
    summary["by_task"] = {"a": {"FTFC": 1, "SR@1": 1, "RC@1": 1}}
    short.joinpath("summary.json").write_text(json.dumps(summary))
    rows = Page(view.view([long, short], tmp_path / "out", 500)).rows
    assert next(row for row in rows if "SR@1" in row[0])[1].startswith("0.0%")  # solved in round 2 only


def test_other_tasks_of_the_same_name_are_not_compared(view, tmp_path):
    pair = make_pair(tmp_path)
    summary = json.loads(pair[1].joinpath("summary.json").read_text())
    summary["task_sha256"]["b"] = "ef" * 32
    pair[1].joinpath("summary.json").write_text(json.dumps(summary))
    with pytest.raises(view.InputError, match="task b differs"):
        view.view(pair, None, 500)


def test_published_numbers_have_a_column_of_their_own(view, tmp_path):
    paper = tmp_path / "paper.yaml"
    paper.write_text("Table 2: {with_tools: true, benchmarks: {birds: {FTFC: {GLM-4.5: 37.8}}}}")
    folder = view.view(make_pair(tmp_path), tmp_path / "out", 500, paper).parent
    rows = Page(folder / "index.html").rows
    assert rows[0][-1] == "published"
    assert next(row for row in rows if "FTFC" in row[0])[-1] == "Table 2, birds: GLM-4.5 37.8"


def test_a_task_shows_base_beside_tuned(pages):
    page = Page(pages["comparison"] / "0001.html")
    text = " ".join(page.text.split())
    parts = ["do a", "base", "✗ not solved", "turn 1, round 3: answered", "tuned ✓ solved", "✓ met"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert page.links[-2:] == ["1/0001.html", "2/0001.html"]


def test_what_was_not_run_has_its_reason(pages):
    page = Page(pages["comparison"] / "2/index.html")
    row = next(row for row in page.rows if row[0] == "lost")
    assert row[1:3] == ["1", "the endpoint failed"]


def test_a_run_that_goes_on_has_pages_too(view, tmp_path):
    write_lines(tmp_path / "run/episodes.jsonl", [episode("a", 0, [1])])
    with open(tmp_path / "run/episodes.jsonl", "a") as file:
        file.write('{"query_id": "b", "ru')  # being written
    folder = view.view([tmp_path / "run"], None, 500).parent
    assert folder == tmp_path / "run/pages" and "run: 1 episodes" in Page(folder / "index.html").text


# ---- What the pages must never do ----


def all_pages(pages):
    found = [path for folder in pages.values() for path in sorted(folder.rglob("*.html"))]
    assert len(found) > 25
    return found


def test_nothing_that_a_model_wrote_becomes_markup(pages):
    seen = 0
    for path in all_pages(pages):
        page = Page(path)
        assert not page.tags & {"script", "img", "link", "iframe", "object", "base", "form"}, path
        assert "onerror" not in page.attributes
        assert "\x1b" not in page.text and "\u202e" not in page.text
        seen += page.text.count(TAG)
        assert page.text.count(TAG) <= page.text.count("{{ 7 * 6 }}")  # no template runs either
        assert "default-src 'none'" in path.read_text()
    assert seen > 40
    assert "⟨U+001B⟩[31m⟨U+202E⟩abc⟨U+D800⟩" in Page(pages["rows"] / "0004.html").text


def test_every_link_leads_to_a_page(pages):
    for path in all_pages(pages):
        for link in Page(path).links:
            assert link.startswith("#") or path.parent.joinpath(link).exists(), (path, link)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("needs chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [1400, 400])
def test_pages_fit_the_window_and_ask_for_nothing(pages, browser, width):
    tab = browser.tab()
    tab.look(width, dark=width == 400)
    wanted = all_pages(pages)
    for path in wanted:
        browser.requests.clear()
        tab.open(path.as_uri())
        assert browser.requests == [path.as_uri()], path
        assert tab.too_wide() == [], path
        assert tab.run("document.title") != "ran"
        tab.run("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert tab.too_wide() == [], f"{path} unfolded"
    assert browser.errors == []


# ---- Pictures and mistakes ----


def test_pictures_are_drawn_from_the_stages_files(tmp_path):
    rows, trained = make_rows(tmp_path / "data"), make_trained(tmp_path / "limi")
    for path, name in ((rows, tmp_path / "data/train"), (trained, trained / "loss")):
        result = subprocess.run([sys.executable, PLOT, path], capture_output=True, text=True)
        assert result.stdout == f"picture: {name}.png, {name}.svg\n", result.stderr
        assert Path(f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    text = trained.joinpath("loss.svg").read_text()
    assert ">limi: loss</text>" in text and ">Learning rate</text>" in text


def test_scores_by_training_rows_stand_beside_the_papers(plot, tmp_path):
    comparison = plot.read_comparison(make_pair(tmp_path))
    assert "paper's" not in plot.inline(plot.comparison_panels(comparison))[1]  # not the paper's tasks
    comparison["tasks"] = [f"agencybench-v1-{number}" for number in range(1, 11)]
    score, by_rows = plot.inline(plot.comparison_panels(comparison))
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", score)
    assert {"Average of FTFC, SR@3, RC@3", "base", "tuned", "51.9", "90.7"} <= {*drawn}
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", by_rows)
    assert {"tuned: 78", "paper's LIMI", "base"} <= {*drawn}
    assert "currentColor" in score and plot.INK not in score


@pytest.mark.parametrize("arm", ["without tools", "one round"])
def test_other_arms_do_not_stand_beside_the_papers_numbers(plot, tmp_path, arm):
    comparison = plot.read_comparison(make_pair(tmp_path))
    comparison["tasks"] = [f"agencybench-v1-{number}" for number in range(1, 11)]
    if arm == "without tools":
        comparison["summaries"][0]["settings"]["no_tools"] = True
    else:
        table = comparison["table"]
        comparison["table"] = {"average": table["average"], "FTFC": table["FTFC"], "SR@1": table["SR@3"]}
    assert "paper's" not in plot.inline(plot.comparison_panels(comparison))[1]


CALLING = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize("messages", [None, "abc", [{"content": "no role"}], [{"role": "user"}], [CALLING]])
def test_rows_that_02_did_not_make_are_told(plot, tmp_path, messages):
    path = write_lines(tmp_path / "bad.jsonl", [{"query_id": "q", "messages": messages}])
    with pytest.raises(plot.InputError, match=r"bad.jsonl:1: messages\[0\]: wants a role, content"):
        list(plot.read_rows(path))


@pytest.mark.parametrize("program", [VIEW, PLOT])
def test_a_mistake_is_told_in_one_line(program, one_line_error, tmp_path):
    def run(*paths):
        return subprocess.run([sys.executable, program, *paths], capture_output=True, text=True)

    bad = write_lines(
        tmp_path / "bad.jsonl", [{"query_id": "q", "messages": [{"role": "user", "content": None}]}]
    )
    one_line_error(run(bad), "bad.jsonl:1", "messages[0]")
    bad.write_text('{"query_id": "q"}\n')
    one_line_error(run(bad), "bad.jsonl:1", "no messages")
    bad.write_text("{\n")
    one_line_error(run(bad), "bad.jsonl:1", "JSON")
    bad.write_text("")
    one_line_error(run(bad), "no row")
    one_line_error(run(tmp_path), str(tmp_path))
    one_line_error(run(tmp_path, tmp_path), "summary.json", "04_eval.py")
    pair = make_pair(tmp_path)
    if program == VIEW:
        one_line_error(run(*pair, "--paper", bad), "--paper", "bad.jsonl")
    one_line_error(run(tmp_path / "none.jsonl"), "none.jsonl")
