"""The label doctor finds each fault that it is shown, and none in right labels."""

import copy
import json

import pytest
from test_03_families import CONVERSATIONS, FAMILIES, TOOLS, template_of, tokenizer

from recipes import label_doctor

TALK = CONVERSATIONS["calls, two turns"]
THOUGHTS = CONVERSATIONS["thoughts, two turns"]
FAMILY = {"GLM-4.5": "GLM-4.5, 4.6", "Qwen3": "Qwen3", "Qwen2.5": "Qwen2.5"}


@pytest.fixture(scope="module")
def sft(stage):
    return stage("03_sft")


@pytest.fixture
def clinic(sft):
    """clinic(family) -> (tokenizer, samples(messages): what 03 trains, examine(messages, samples): kinds found)."""

    def make(family):
        name, stops, switches, _ = FAMILIES[FAMILY[family]]
        tok = tokenizer(template_of(name), stops, switches)
        tok.end_id = sft.token_after_an_answer(tok)

        def row(messages):
            return {"messages": messages, "tools": TOOLS}

        def samples(messages):
            pairs = sft.encode_conversation(tok, messages, TOOLS)
            return [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in pairs]

        def examine(messages, given):
            return [finding.kind for finding in label_doctor.examine_row(sft, tok, row(messages), given)]

        return tok, samples, examine

    return make


@pytest.mark.parametrize("family", FAMILY)
def test_right_labels_are_exact(clinic, family):
    _, samples, examine = clinic(family)
    for title in ("plain", "a call", "two calls", "calls, two turns", "nested arguments", "other letters", "two turns"):
        messages = CONVERSATIONS[title]
        turns = sum(message["role"] == "assistant" for message in messages)
        assert examine(messages, samples(messages)) == ["exact"] * turns, title


def spans(sample):
    """[(first, end)] of the runs of labels."""
    trained = [label != -100 for label in sample["labels"]] + [False]
    starts = [i for i, on in enumerate(trained) if on and not (i and trained[i - 1])]
    return [(start, trained.index(False, start)) for start in starts]


def silence(sample, places):
    sample["labels"] = [-100 if i in places else label for i, label in enumerate(sample["labels"])]


def no_stop(sample):
    silence(sample, {end - 1 for _, end in spans(sample)})


def cut_beginning(sample):
    silence(sample, {spans(sample)[0][0], spans(sample)[0][0] + 1})


def hole(sample):
    silence(sample, {spans(sample)[0][0] + 3})


def silent_turn(sample):
    silence(sample, set(range(*spans(sample)[1])))


def header_too(sample):
    start = spans(sample)[0][0]
    sample["labels"][start - 2 : start] = sample["input_ids"][start - 2 : start]


def user_too(sample):
    sample["labels"][:3] = sample["input_ids"][:3]


def truncated(sample):
    end = spans(sample)[-1][1] - 4
    sample["input_ids"] = sample["input_ids"][:end]
    sample["labels"] = sample["labels"][:end]


def truncated_before(sample):
    end = spans(sample)[-1][0] - 4
    sample["input_ids"] = sample["input_ids"][:end]
    sample["labels"] = sample["labels"][:end]


def other_context(sample):
    sample["input_ids"][2] += 1


PLANTED = {
    "stop token": no_stop,
    "beginning": cut_beginning,
    "hole": hole,
    "not trained": silent_turn,
    "extra": header_too,
    "truncated": truncated,
    "context": other_context,
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("family", FAMILY)
def test_a_planted_fault_is_named(clinic, family, kind):
    _, samples, examine = clinic(family)
    messages = TALK[:4]
    given = samples(messages)
    PLANTED[kind](given[0])
    assert kind in examine(messages, given)
    assert set(examine(messages, given)) <= {kind, "exact"}


@pytest.mark.parametrize("family", FAMILY)
def test_a_sample_that_ends_before_a_turn_is_truncated(clinic, family):
    _, samples, examine = clinic(family)
    messages = TALK[:4]
    given = samples(messages)
    truncated_before(given[0])
    assert examine(messages, given) == ["exact", "truncated"]


def test_no_fault_of_a_turn_hides_behind_another(clinic):
    _, samples, examine = clinic("Qwen2.5")
    messages = CONVERSATIONS["plain"]
    given = samples(messages)
    for fault in (cut_beginning, no_stop):
        fault(given[0])
    start = given[0]["labels"].index(next(label for label in given[0]["labels"] if label != -100))
    silence(given[0], {start + 2})
    assert examine(messages, given) == ["beginning", "hole", "stop token"]


def test_a_row_is_read_as_03_reads_it(clinic):
    """Keys without a value are left out; what 03 would not take is refused, not a traceback."""
    _, samples, examine = clinic("GLM-4.5")
    messages = CONVERSATIONS["a call"]
    given = samples(messages)
    empty = {"tool_calls": None, "reasoning_content": None, "weight": 1}
    assert examine([empty | message if message["role"] == "assistant" else message for message in messages], given) == [
        "exact", "exact"]
    for message in ({"role": "assistant", "content": None}, {"role": "assistant", "content": "<|user|>"}, {"content": "A"}):
        assert examine([*messages[:2], message], given) == ["refused"]


def test_loss_on_what_the_user_says_is_extra(clinic):
    _, samples, examine = clinic("Qwen2.5")
    given = samples(TALK)
    user_too(given[0])
    assert examine(TALK, given) == ["exact"] * 4 + ["extra"]


@pytest.mark.parametrize("lost", ["call", "thought", "text"])
def test_what_the_labels_lack_is_missing(clinic, lost):
    """Samples of a row from which something was dropped, beside the row that has it."""
    _, samples, examine = clinic("Qwen3")
    messages = CONVERSATIONS["thoughts"]
    less = copy.deepcopy(messages)
    if lost == "call":
        del less[1]["tool_calls"]
        less[1]["content"] = "I look."
        del less[2]
    elif lost == "thought":
        del less[1]["reasoning_content"]
    else:
        less[3]["content"] = "."
    assert "missing" in examine(messages, samples(less))


def test_a_thought_that_a_later_turn_removes_was_never_served_so(clinic, sft):
    """One rendering of two turns, as most trainers make it: Qwen3's template drops the first thought."""
    tok, _, examine = clinic("Qwen3")
    text = sft.render(tok, THOUGHTS, TOOLS)
    ids = tok(text, add_special_tokens=False)["input_ids"]
    found = examine(THOUGHTS, [{"input_ids": ids, "labels": list(ids)}])
    assert found[0] in ("missing", "written otherwise", "context never served")


def test_a_row_that_the_template_cannot_show_is_refused(clinic):
    _, _, examine = clinic("Qwen2.5")
    assert examine(CONVERSATIONS["thoughts"], [{"input_ids": [1], "labels": [1]}]) == ["refused"]


def test_another_stop_token_is_no_missing_one(clinic):
    """GLM-4.5's engine stops at <|endoftext|> too; the template goes on with <|user|>."""
    tok, samples, examine = clinic("GLM-4.5")
    messages = CONVERSATIONS["plain"]
    given = samples(messages)
    last = spans(given[0])[-1][1] - 1
    other = tok.convert_tokens_to_ids("<|endoftext|>")
    given[0]["input_ids"][last] = given[0]["labels"][last] = other
    assert examine(messages, given) == ["another stop token"]
    given[0]["labels"][last] = -100
    assert examine(messages, given) == ["stop token"]


def test_the_same_words_in_a_result_are_not_the_turn(clinic):
    _, samples, examine = clinic("Qwen2.5")
    messages = copy.deepcopy(CONVERSATIONS["a bare call"])
    messages[2]["content"] = messages[3]["content"]
    given = samples(messages)
    other_context(given[0])
    last = spans(given[0])[-1][1] - 1  # so that the words alone are looked for
    given[0]["input_ids"][last] = given[0]["labels"][last] = given[0]["input_ids"][0]
    assert examine(messages, given) == ["context", "context", "stop token"]


def test_what_should_be_trained_is_written_for_the_page(clinic):
    from recipes import view

    _, samples, examine = clinic("Qwen2.5")
    (sample,) = samples(CONVERSATIONS["plain"])
    start, end = spans(sample)[0]
    no_stop(sample)
    user_too(sample)
    examine(CONVERSATIONS["plain"], [sample])
    assert sample["right"] == list(range(start, end))
    kinds = view.token_kinds(sample)
    assert kinds[:4] == ["extra"] * 3 + ["context"]
    assert kinds[start:end] == ["trained"] * (end - start - 1) + ["untrained"]


def test_from_the_shell(sft, monkeypatch, tmp_path, capsys, clinic):
    tok, samples, _ = clinic("Qwen2.5")
    monkeypatch.setattr(sft, "load_tokenizer", lambda *_: tok)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"query_id": "a", "messages": TALK, "tools": TOOLS}) + "\n")
    dump = tmp_path / "dump.jsonl"
    (sample,) = samples(TALK)
    flags = ["--tokenizer", "x", "--rows", str(rows), "--labels", str(dump)]
    dump.write_text(json.dumps(sample) + "\n")
    folder = tmp_path / "told"
    assert label_doctor.main([*flags, "--output_dir", str(folder)]) == 0
    assert capsys.readouterr().out == f"exact: 4\nwrote {folder}/tokenized.jsonl: what is trained; recipes/view.py shows it\n"
    (shown,) = map(json.loads, (folder / "tokenized.jsonl").read_text().splitlines())
    assert (shown["query_id"], shown["input_ids"], shown["verdicts"]) == ("a", sample["input_ids"], [])
    assert {index for index, label in enumerate(sample["labels"]) if label != -100} == set(shown["right"])
    assert (folder / "tokenizer.json").exists()  # recipes/view.py needs no more
    no_stop(sample)
    dump.write_text(json.dumps(sample | {"query_id": "a"}) + "\n")
    assert label_doctor.main(flags) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{rows}:1: messages[1]: stop token: ") and lines[-1] == "stop token: 4"
    told = "dump.jsonl:1: input_ids and labels must be lists of one length"
    shifted = sample | {"labels": [*sample["labels"][1:], -100]}
    for line, error in [
        (sample | {"query_id": "b"}, "dump.jsonl:1: belongs to no row"),
        ({"input_ids": 5, "labels": [5]}, told),
        ({"input_ids": [5], "labels": []}, told),
    ]:
        dump.write_text(json.dumps(line) + "\n")
        assert label_doctor.main(flags) == 2 and error in capsys.readouterr().err
    dump.write_text(json.dumps(shifted) + "\n")  # as a model that is fed its labels' neighbours would have them
    assert label_doctor.main(flags) == 1
    assert "messages[1]: another token: " in capsys.readouterr().out


def test_samples_belong_to_the_row_of_their_query_id(sft, monkeypatch, tmp_path, capsys, clinic):
    """As 03 names them: a number as text, a row without a name by its place; no guess where two rows have one name."""
    tok, samples, _ = clinic("Qwen2.5")
    monkeypatch.setattr(sft, "load_tokenizer", lambda *_: tok)
    rows = tmp_path / "rows.jsonl"
    dump = tmp_path / "dump.jsonl"
    row = {"messages": TALK, "tools": TOOLS}
    (sample,) = samples(TALK)
    flags = ["--tokenizer", "x", "--rows", str(rows), "--labels", str(dump)]
    rows.write_text(json.dumps(row | {"query_id": 5}) + "\n" + json.dumps(row) + "\n")
    named = [sample | {"query_id": name} for name in (f"{rows}:2", "5")]
    dump.write_text("".join(json.dumps(line) + "\n" for line in named))
    assert label_doctor.main(flags) == 0
    rows.write_text((json.dumps(row | {"query_id": "5"}) + "\n") * 2)
    dump.write_text((json.dumps(sample | {"query_id": "5"}) + "\n") * 2)
    assert label_doctor.main(flags) == 2
    assert "dump.jsonl:1: belongs to no row of --rows, or to several of one query_id" in capsys.readouterr().err
    dump.write_text((json.dumps(sample) + "\n") * 2)
    assert label_doctor.main(flags) == 0
