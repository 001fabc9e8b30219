"""The annotators' page, for tasks before they are selected and for rows before they are trained on.

    python recipes/review.py data/work/4_check.jsonl --reviewers ada ben cem dua --overlap 2
    python recipes/review.py data/train.jsonl --reviewers ada
    python recipes/review.py data/train.jsonl --accepted data/reviewed.jsonl    # no page: what stays

Prints an address for each reviewer; Ctrl-C ends. Every decision is stored the moment it is taken.

Reads  data/work/4_check.jsonl (01; rows with reasons are out already) or data/train.jsonl (02)
Writes reviews.jsonl beside the tasks (01's `select` reads it), train.reviews.jsonl beside the rows: one line
       a decision, {"query_id", "reviewer", "decision", "reason"?, "note"?, "edit"?, "at"}; accept or reject;
       the last decision of a reviewer counts. "edit" has only what that reviewer changed ("queries",
       "rubric", "domain"), so a later decision without an edit leaves it as it is.
"""

import argparse
import datetime
import http.server
import json
import re
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from decisions import agreement, assign, edited, names_of, read_reviews, store, verdict  # noqa: E402
from pages import ENVIRONMENT  # noqa: E402
from plot import InputError, read_lines  # noqa: E402

DOMAINS = ["vibe_coding", "research"]
# The paper's four annotators asked whether a query matches its pull request; the rest makes a task unfair
TASK_REASONS = ["does not match the pull request", "belongs to neither domain", "quality: vague"]
TASK_REASONS += ["quality: trivial", "tells the solution", "cannot be verified", "repeats another", "other"]
ROW_REASONS = ["does not do what was asked", "belongs to neither domain", "quality: careless work"]
ROW_REASONS += ["quality: wrong answer", "broken tool calls", "private data", "repeats another", "other"]


# ---- What is reviewed, and what was said ----


def read_items(path):
    """Tasks that passed 01's rules, or rows of 02. Raises InputError."""
    items = []
    for where, row in read_lines(path, "query_id"):
        if "turns" not in row and "messages" not in row:
            raise InputError(f"{where}: neither turns (a task of 01) nor messages (a row of 02)")
        if not row.get("reasons"):
            items.append(row)
    if not items:
        raise InputError(f"{path}: nothing in it is to be reviewed")
    return items


def default_output(path, items):
    """Where 01's select looks, for tasks."""
    return path.with_name("reviews.jsonl") if "turns" in items[0] else path.with_suffix(".reviews.jsonl")


def report(items, path, reject):
    """Print what was decided and how far the reviewers agree; return what stays, edited."""
    found, edits = read_reviews(path)
    names = names_of(items)
    given = [list(found[name].values()) for name in names]
    stays = [verdict(decisions, reject) for decisions in given]
    units = []
    for decisions in given:
        units.append([record["decision"] for record in decisions])
    alpha, count = agreement(units)
    said = f"Krippendorff's alpha {alpha:.2f} over {count} items" if count else "no item has two reviewers"
    print(f"accepted: {stays.count(True)}\nrejected: {stays.count(False)} ({reject} of the reviewers)")
    print(f"open: {stays.count(None)}\nagreement: {said}")
    return [edited(item, edits[name]) for item, name, stay in zip(items, names, stays) if stay]


# ---- The page ----


def as_it_was(text):
    """A text of the page, with the character itself where the page shows what cannot be seen."""
    return re.sub("⟨U\\+((?!D[89A-F])[0-9A-F]{4})⟩", lambda found: chr(int(found[1], 16)), text)


class Desk:
    """The items on the reviewers' desks. reviewers: {secret part of the address: name}."""

    def __init__(self, items, path, reviewers, overlap):
        self.items, self.names, self.path = items, names_of(items), path
        self.reviewers = {secrets.token_urlsafe(12): name for name in reviewers}
        self.work = assign(items, reviewers, overlap)
        self.reasons = TASK_REASONS if "turns" in items[0] else ROW_REASONS

    def first_open(self, reviewer, after=0):
        """Place (from 1) of the next item that the reviewer has not decided, or None."""
        found, _ = read_reviews(self.path)
        places = range(1, len(self.work[reviewer]) + 1)
        for place in [*places[after:], *places[:after]]:
            if reviewer not in found[self.item(reviewer, place)[1]]:
                return place
        return None

    def item(self, reviewer, place):
        """(item, what its decisions call it)"""
        number = self.work[reviewer][place - 1]
        return self.items[number], self.names[number]

    def page(self, reviewer, place):
        found, edits = read_reviews(self.path)
        item, name = self.item(reviewer, place)
        own = self.work[reviewer]
        return ENVIRONMENT.get_template("review.html").render(
            item=edited(item, edits[name]),
            name=name,
            editors=sorted({editor for editor, _ in edits[name]} - {reviewer}),
            given=found[name].get(reviewer, {}),
            done=sum(reviewer in found[self.names[number]] for number in own),
            place=place,
            count=len(own),
            reviewer=reviewer,
            reasons=self.reasons,
            domains=DOMAINS,
            nonce=secrets.token_urlsafe(12),
        )

    def take(self, reviewer, place, said):
        """Store a decision: {"decision", "reason"?, "note"?, and what was changed}. Raises InputError."""
        reject = said.get("decision") == "reject"
        if not reject and said.get("decision") != "accept":
            raise InputError("a decision is accept or reject")
        if reject and said.get("reason") not in self.reasons:
            raise InputError("choose one of the reasons")
        if said.get("reason") == "other" and not said.get("note", "").strip():
            raise InputError("other: say in the note what it is")
        item, name = self.item(reviewer, place)
        record = {"query_id": name, "reviewer": reviewer, "decision": said["decision"]}
        record |= {key: said[key] for key in ("reason", "note") if said.get(key)}
        if edit := self.edit_of(item, name, said):
            record["edit"] = edit
        now = datetime.datetime.now(datetime.UTC)
        store(self.path, record | {"at": now.isoformat(timespec="microseconds")})

    def edit_of(self, item, name, said):
        """What a reviewer changed. said["queries"]: {number of a turn: its new text}."""
        edit = {"domain": said["domain"]} if "domain" in said else {}
        if "rubric" in said:
            edit["rubric"] = list(map(as_it_was, said["rubric"]))
        if said.get("queries"):
            _, edits = read_reviews(self.path)
            turns = edited(item, edits[name])["turns"]  # as all have made them by now
            queries = [turn["query"] for turn in turns]
            for number, text in said["queries"].items():
                if not text.strip():
                    raise InputError("a query cannot be empty")
                queries[int(number)] = as_it_was(text)
            edit["queries"] = queries
        return edit


def make_server(desk, port):
    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, status, text, **headers):
            self.send_response(status)
            headers |= {"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store"}
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(text.encode())

        def wanted(self):
            """(reviewer, place) of /SECRET/PLACE; None where it is not ours, or a foreign page asks."""
            host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            secret, _, place = self.path.strip("/").partition("/")
            reviewer = desk.reviewers.get(secret)
            local = host.split(":")[0] in ("127.0.0.1", "localhost") and origin in (None, f"http://{host}")
            if not (local and reviewer and (place or "0").isdecimal()):
                return None
            place = int(place or 0)
            return (reviewer, place) if place <= len(desk.work[reviewer]) else None

        def do_GET(self):
            if not (wanted := self.wanted()):
                return self.reply(403, "open the address that was printed")
            reviewer, place = wanted
            if place:
                return self.reply(200, desk.page(reviewer, place), Referrer_Policy="no-referrer")
            place = desk.first_open(reviewer) or 1
            self.reply(302, "", Location=f"{self.path.rstrip('/')}/{place}")

        def do_POST(self):
            wanted = self.wanted()
            if not wanted or not wanted[1]:
                return self.reply(403, "this did not come from a page of this run")
            try:
                said = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                desk.take(*wanted, said)
            except (ValueError, LookupError, AttributeError, TypeError) as error:  # InputError too
                return self.reply(400, str(error))
            self.reply(200, str(desk.first_open(wanted[0], wanted[1]) or ""))

        def log_message(self, *args):
            """No line a request."""

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; name another one") from None


def serve(desk, port):
    server = make_server(desk, port)
    port = server.server_port
    for secret, name in desk.reviewers.items():
        print(f"{name}: {len(desk.work[name])} items at http://127.0.0.1:{port}/{secret}/")
    print(f"(elsewhere: ssh -L {port}:127.0.0.1:{port} HOST first; Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


def main(arguments):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=form)
    parser.add_argument("path", type=Path, help="4_check.jsonl of 01, or train.jsonl of 02")
    parser.add_argument("--reviewers", nargs="+", default=["me"], help="names (default: me)")
    parser.add_argument("--overlap", type=int, default=2, help="reviewers of each item (default: 2, or all)")
    whose = "whose no counts (default: %(default)s)"
    parser.add_argument("--reject", choices=["any", "majority"], default="any", help=whose)
    parser.add_argument("--port", type=int, default=8765, help="of the page (default: 8765)")
    parser.add_argument("--reviews", type=Path, help="where the decisions are stored (default: beside PATH)")
    parser.add_argument("--accepted", type=Path, help="write what stays to this file and end")
    settings = parser.parse_args(arguments)
    items = read_items(settings.path)
    path = settings.reviews or default_output(settings.path, items)
    if not settings.accepted:
        reviewers = dict.fromkeys(settings.reviewers)
        overlap = max(1, min(settings.overlap, len(reviewers)))
        serve(Desk(items, path, reviewers, overlap), settings.port)
    kept = report(items, path, settings.reject)
    if settings.accepted:
        lines = [json.dumps(item) + "\n" for item in kept]
        settings.accepted.write_text("".join(lines), encoding="utf-8")
        print(f"kept: {settings.accepted}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
