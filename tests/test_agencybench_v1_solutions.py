"""The reference solutions of the turns of AgencyBench v1 that a judge grades, tried as their criteria say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import Browser, find_chromium

PRIVATE = Path(__file__).resolve().parents[1] / "recipes/benchmarks/agencybench_v1"


def talk_to(command, folder, text):
    process = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, timeout=60)
    return process.stdout


def build(tmp_path, number):
    """The folder that the solution of a subtask leaves."""
    script = PRIVATE.joinpath(f"solutions/{number}.sh").read_text().replace("/private", str(PRIVATE))
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    return tmp_path / "workspace"


FIRST = """\
register ann pw
login ann no
login ann pw
add bob
add carl
alias bob Bobby
chat bob
Hello World
how are you
/back
logout
exit
"""
AGAIN = """\
login ann pw
list
/search hello
chat Bobby
/history 1
/back
remove carl
list
logout
exit
"""


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("make"), reason="needs make and g++")
def test_the_reference_chat_system(tmp_path):
    folder = build(tmp_path, "1.5")
    said = talk_to("bin/chat_app", folder, FIRST)
    assert "wrong name or password" in said
    assert "[ann] Hello World\n[Bobby] Hello!\n" in said
    said = talk_to("bin/chat_app", folder, AGAIN)
    assert "Bobby (online)\ncarl (online)\n" in said
    assert "> Bobby (online)\n> " in said  # carl is gone
    assert "(Bobby) ann: **Hello** World\n(Bobby) bob: **Hello**!\n2 messages found\n" in said
    assert "ann: Hello World\nbob: Hello!\nann: how are you\nbob: I see.\n" in said


NEW = """\
register ann pw
login ann no
login ann pw
add Team Meeting | talk | high | 2030-02-01 | work
add Shop | milk | low | 2030-01-01
done 1
archive 1
logout
"""
LOOKS = """\
login ann pw
list
/search meeting
/filter priority=low
/sort deadline
"""


@pytest.mark.skipif(not shutil.which("javac"), reason="needs javac")
def test_the_reference_task_manager(tmp_path):
    folder = build(tmp_path, "2.5")
    java = ["java", "-cp", "bin", "Main"]
    said = talk_to(java, folder, NEW)
    assert "wrong name or password" in said and "task 1 is archived" in said
    said = talk_to(java, folder, LOOKS)
    assert said.count("Team Meeting") == 1  # archived: only the search finds it
    assert said.count("Shop") == 3
    users = {}
    for name in ("bob", "carl", "dora"):
        users[name] = subprocess.Popen([*java, "--user", name], cwd=folder, stdin=-1, stdout=-1, text=True)
    for name, process in users.items():
        process.stdin.write("".join(f"add {name} {number}\n" for number in range(20)))
        process.stdin.close()
    for process in users.values():
        assert process.wait(60) == 0
    lines = folder.joinpath("data/tasks.tsv").read_text().splitlines()
    ids = [int(line.split("\t")[0]) for line in lines]
    assert sorted(ids) == list(range(1, 63))  # 60 and ann's two: none lost, none twice


def test_the_reference_pipeline(tmp_path):
    for number in range(1, 6):
        folder = build(tmp_path, f"4.{number}")

    def events(mode):
        command = [sys.executable, folder / "task1_generator.py", "--seed", "42", "--mode", mode]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return folder.joinpath("data/events.jsonl").read_text()

    def report(name):
        return json.loads(folder.joinpath(name).read_text())

    first = folder.joinpath("data/events.jsonl").read_text()
    assert len(first.splitlines()) == 10
    assert events("overwrite") == first
    both = events("append")
    assert both.startswith(first)
    assert len({json.loads(line)["id"] for line in both.splitlines()}) == 20
    planned = report("reports/planner_report.json")
    assert planned["goal_reached"] and planned["plan_length"] == 5
    repaired = report("reports/repair_report.json")
    assert repaired["status"] == "repaired"
    assert repaired["trigger"] == "timeout after 0.3 s"
    patch = report("patches/patch1.json")
    assert patch["operators"] == {"glue table": {"timeout": 1.2}}


DUEL = """
newGame();
let won = 0;
for (let game = 0; game < 10; game++, newGame()) {
  while (!winner) { const { x, y } = aiMove(moves.length % 2 === game % 2 ? "Medium" : "Easy"); play(x, y); }
  won += winner === 1 + (game % 2);
}
const answers = [won];
for (const level of ["Medium", "Hard", "Expert"]) {
  newGame();
  for (const [x, y] of [[7, 7], [0, 0], [8, 7], [0, 2], [9, 7], [0, 4], [10, 7]]) play(x, y);
  const { x, y } = aiMove(level); // black has four with both ends open
  answers.push([x, y].join());
  newGame();
  for (const [x, y] of [[7, 7], [0, 0], [8, 7], [0, 1], [9, 7], [0, 2], [2, 9], [0, 3], [12, 12]]) play(x, y);
  answers.push(Object.values(aiMove(level)).slice(0, 2).join()); // white wins at once
}
const edge = [0, 1, 2, 3, 4, 5].map((x) => ({ x, y: 14, color: BLACK }));
newGame();
for (const { x, y } of edge) board[y][x] = BLACK;
answers.push(checkWin(edge[0]).length); // six in a row, along the edge
console.log(JSON.stringify(answers));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_opponents_of_the_reference_gomoku(tmp_path):
    build(tmp_path, "3.5")
    script = tmp_path.joinpath("app.js").read_text() + DUEL
    won, *moves, six = json.loads(subprocess.check_output(["node", "-e", script], text=True, timeout=120))
    assert won > 7 and six == 6
    assert all(move in ("6,7", "11,7") for move in moves[::2]) and moves[1::2] == ["0,4"] * 3


@pytest.fixture
def page(tmp_path):
    """page(number) -> the tab with the page that the solution of a subtask leaves."""
    pytest.importorskip("websockets")
    if not find_chromium():
        pytest.skip("needs chromium")
    browser = Browser(tmp_path / "profile")
    tab = browser.tab()

    def show(number):
        build(tmp_path, number)
        tab.open(f"file://{tmp_path}/index.html")
        return tab

    yield show
    browser.close()
    assert browser.errors == []


# Black wins along the top of these
ROW = ["3-3", "3-4", "4-3", "4-4", "5-3", "5-4", "6-3", "6-4", "7-3"]


def click(tab, *points):
    """What the page says after clicks on the points."""
    for point in points:
        tab.click(f"#p{point}")
    return tab.run("find('status').textContent")


def count(tab, selector):
    return tab.run(f"document.querySelectorAll('{selector}').length")


def test_the_first_page_of_the_reference_gomoku_knows_no_win(page):
    tab = page("3.1")
    assert click(tab, *ROW) == "White to move"
    assert count(tab, "#undo, #mode, #debug") == 0


def test_the_last_page_of_the_reference_gomoku(page):
    tab = page("3.5")
    assert click(tab, "3-3", "3-4", "3-4") == "Black to move"  # taken: no move
    assert click(tab, *ROW[2:], "10-10") == "Black Wins"  # and locked
    assert count(tab, ".won") == 5
    tab.click("#undo")
    assert click(tab, "10-10") == "White to move"  # another branch
    tab.click("#redo")
    assert count(tab, ".black, .white") == 9
    tab.click("#replay")
    click(tab, "12-12")  # no move while it runs
    tab.wait("!busy")
    assert count(tab, ".black, .white") == 9
    tab.run("find('mode').value = 'ai'; find('level').value = 'Expert'; find('mode').onchange()")
    click(tab, "7-7")
    tab.wait("moves.length === 2")
    assert tab.run("find('metrics').textContent").startswith("depth d=")
