"""What a query gives away of a pull request, and what its tests demand: 01_build_queries.py loads this file.

asked_texts(source, test_diff)   texts that the tests compare with: no query can leave them out, and giving
                                 them is no leak
Solution(material, old, title).leaks(text)   yields what a text gives away: names of the solution in any case,
                                 half a line of it word for word or with its variables renamed, the place to
                                 change, a means that it uses, the title; mere ideas are left to --judge_model
demanded_names(secret, tests)    names that the change brings and the tests use

material: {"secret": diff of the code, "tests": diff of the tests, "asked": [text]}; old: the files before.
"""

import ast
import re
import warnings
from pathlib import Path


def added_lines(diff):
    return [line[1:].strip() for line in diff.splitlines() if re.match(r"\+(?!\+\+ )", line)]


def words_of(text):
    """Words in lower case; a Chinese or Japanese character is a word."""
    return re.findall(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+", text.lower())


def ngrams(text, n):
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def says(text, fragment):
    """Does a text say a fragment, whatever the case and the signs between its words?"""
    return f" {' '.join(words_of(fragment))} " in f" {' '.join(words_of(text))} "


def parts_of(node, is_regex):
    """The constant texts of an expression: of a literal, an f-string, a sum, re.escape(...)."""
    if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in ("re.escape", "re.compile"):
        return parts_of(node.args[0], ast.unparse(node.func) == "re.compile")
    if isinstance(node, ast.BinOp):
        return parts_of(node.left, is_regex) + parts_of(node.right, is_regex)
    if isinstance(node, ast.JoinedStr):
        return sum((parts_of(value, is_regex) for value in node.values), [])
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return []
    text = node.value
    if is_regex:  # what stands between its signs
        text = re.sub(r"\\[dDwWsSbBAZ]|(?<!\\)(\[[^\]]*\]|[.^$*+?{}()|])", "\n", text)
        text = re.sub(r"\\(.)", r"\1", text)
    return text.split("\n")


def compared(node):
    """[(expression, is it a regex)] that a node of a test compares with."""
    if isinstance(node, ast.Compare):
        return [(side, False) for side in (node.left, *node.comparators)]
    if not isinstance(node, ast.Call):
        return []
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    found = []
    if re.match(r"assert|raises|warns", name, re.I):
        found = [(side, "egex" in name or "aises" in name) for side in node.args]
    return found + [(word.value, True) for word in node.keywords if word.arg in ("match", "expected_regex")]


def asked_by_python(source):
    """Yield (first line, last line, text) of what Python tests compare with."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(source)
    for node in ast.walk(tree):
        for side, is_regex in compared(node):
            for part in parts_of(side, is_regex):
                yield getattr(side, "lineno", 0), getattr(side, "end_lineno", 0), part


# The same in other languages: what stands in quotes behind a comparison on one line.
COMPARISONS = (
    "toBe|toEqual|toStrictEqual|toThrow\\w*|toMatch\\w*|toContain|equal|strictEqual|deepEqual|throws|match|"
    "Contains|Equal\\w*|EqualError|assert_eq!|contains|expect"
)
ASSERTION = re.compile(rf"""(?:==|!=|\b(?:{COMPARISONS})\()[^"'`\n]*(["'`])((?:\\.|(?!\1).)*)\1""")


def asked_texts(source, test_diff):
    """Texts of three words or more that the lines added by the diff demand. source: the whole test file."""
    added = set(added_lines(test_diff))
    lines = source.splitlines()
    try:
        found = list(asked_by_python(source))
    except (SyntaxError, ValueError):  # another language
        found = []
        for number, line in enumerate(lines, 1):
            found += [(number, number, match[2]) for match in ASSERTION.finditer(line)]
    asked = {}
    for first, last, text in found:
        is_new = any(line.strip() in added for line in lines[first - 1 : last])
        if is_new and len(words_of(text)) >= 3:
            asked[text.strip()] = None
    return list(asked)


def names_in(text):
    """Words that can only be names in code: with _, a digit, an inner capital, in backticks, called."""
    plain = re.findall(r"[A-Za-z_]\w+", text)
    found = {word for word in plain if re.search(r"_|\d|[a-z][A-Z]", word)}
    found.update(re.findall(r"`\.?([A-Za-z_]\w+)[^`\w]*`", text))
    found.update(re.findall(r"\b([A-Za-z_]\w+)\(", text))
    return found


def bare(name):
    """A name without case and underscores: atomicTypes, _ATOMIC_TYPES and atomic_types are one."""
    return name.replace("_", "").lower()


def tokens_of(text):
    return re.findall(r"\w+|[^\w\s]", text)


def shape_of(tokens):
    """Tokens with every name replaced: equal for code whose variables were renamed."""
    kept = {
        "if",
        "else",
        "for",
        "in",
        "not",
        "is",
        "and",
        "or",
        "return",
        "None",
        "True",
        "False",
        "lambda",
        "raise",
    }
    return ["v" if re.match(r"[A-Za-z_]", token) and token not in kept else token for token in tokens]


def runs_of(tokens, length):
    return {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}


def code_like(run):
    """Signs that prose does not have so close together."""
    return sum(token in set("()[]{}=<>+*/%|&:._!") for token in run) >= 3 and len(set(run) - {"v"}) >= 3


ADVICE = (
    r"\b(?:use|using|call|calling|replace|wrap|switch|swap|return|pass|add|import|check|compare|convert|"
    r"store|insert|make|via|with|inherit|change|turn|function|method|helper|module)\b[^.\n]{0,80}?\b(%s)\b"
)
PLACE = (
    r"\b(?:change|modify|edit|fix|rewrite|patch|update|adjust|extend|touch|look at|body of|code of|lines? of)"
    r"\b[^.\n]{0,30}?\b%s\b"
)
FUNCTION = r"\b(?:def|func|function|fn)\s+(?:\([^)]*\)\s*)?(\w+)"


class Solution:
    """What a query must not give away of a pull request: its material seen as code."""

    def __init__(self, material, old, title=""):
        diff = material["secret"]
        old_lines = {line.strip() for line in old.splitlines()}
        public = old + material["tests"] + " ".join(material["asked"])
        self.title = title
        self.asked = material["asked"]
        self.given = [r"\W+".join(map(re.escape, words_of(text))) for text in material["asked"]]
        self.added = [line for line in added_lines(diff) if line and line not in old_lines]
        self.paths = re.findall(r"(?m)^\+\+\+ b/(.+?)\t?$", diff)
        self.public = {bare(word) for word in re.findall(r"\w+", public)}
        self.public_runs = runs_of(tokens_of(public.lower()), 3)
        self.public_shapes = runs_of(shape_of(tokens_of(public)), 8)
        self.read_names(diff)

    def read_names(self, diff):
        """names: new ones; called: functions, attributes, modules among them; functions: that change."""
        code = without_texts("\n".join(self.added))
        self.names = set()
        for word in re.findall(r"[A-Za-z_]\w+", code):
            if len(bare(word)) > 2 and bare(word) not in self.public:
                self.names.add(bare(word))
        called = re.findall(r"([A-Za-z_]\w{3,})\s*\(", code) + re.findall(r"\.([a-z_]\w{3,})\b", code)
        called += re.findall(r"\bimport (\w+)", code)
        self.called = sorted(name for name in set(called) if bare(name) in self.names)
        self.functions = sorted(
            {*re.findall(r"(?m)^@@ .*@@.*?" + FUNCTION, diff), *re.findall(r"(?m)^[ +-].*?" + FUNCTION, diff)}
        )

    def leaks(self, text):
        """Yield what a text gives away; the texts that the tests ask for may be given."""
        for asked in self.given:
            text = re.sub(rf"(?i)\b{asked}\b", "", text)
        for name in sorted(names_in(text)):
            if bare(name) in self.names:
                yield f"leaks a new name of the solution: {name}"
        for line in self.added:
            if self.repeats(line, text):
                yield f"repeats a line of the solution: {line}"
        yield from self.leaked_place(text)
        if len(words_of(self.title)) >= 5 and says(text, self.title):
            yield "repeats the title of the pull request"
        advice = (
            re.search(ADVICE % "|".join(map(re.escape, self.called)), text, re.I) if self.called else None
        )
        if advice:
            yield f"leaks a means of the solution: {advice[1]}"

    def repeats(self, line, text):
        """Does a text have half a line of the solution, word for word or with its variables renamed?"""
        own = tokens_of(line.lower())
        if line.lower() in text.lower() and len(line) > 20 or ngrams(text, 8) & ngrams(line, 8):
            return True
        if any(map(code_like, runs_of(tokens_of(text.lower()), 6) & runs_of(own, 6))):
            return True
        for quoted in re.findall(r"`([^`\n]+)`", text.lower()):
            tokens = tuple(tokens_of(quoted))
            is_public = runs_of(tokens, 3) <= self.public_runs
            if len(tokens) >= 3 and not is_public and tokens in runs_of(own, len(tokens)):
                return True
        shapes = runs_of(shape_of(tokens_of(text)), 8) & runs_of(shape_of(tokens_of(line)), 8)
        return any(map(code_like, shapes - self.public_shapes))

    def leaked_place(self, text):
        """The file to change, a function that is nobody else's business, or an order which one to change."""
        for path in self.paths:
            if re.search(rf"(?<![\w/]){re.escape(path)}|(?<!\w){re.escape(Path(path).name)}\b", text):
                yield f"names the file to change: {path}"
        for name in self.functions:
            inner = name.startswith("_") and not name.startswith("__")
            ordered = re.search(PLACE % re.escape(name), text, re.I)
            if ordered or inner and re.search(rf"\b{name}\b", text):
                yield f"says which function to change: {name}"


def without_texts(code):
    """Code without its string literals."""
    return re.sub(r"""(["'`])(?:\\.|(?!\1).)*\1""", '""', code)


def demanded_names(secret, tests):
    """Names and options that the added code defines and the added tests use."""
    added, used = ["\n".join(added_lines(diff)) for diff in (secret, tests)]
    defined = set(re.findall(r"\b(?:def|class|func|function|fn)\s+(?:\([^)]*\)\s*)?([A-Za-z_]\w+)", added))
    for line in re.findall(r"(?m)^(?:async )?def .*|^\s+\w+: .*[,=].*", added):
        defined.update(re.findall(r"(\w{3,})\s*(?::[^,=]+)?=", line))
    defined.update(re.findall(r"(?<![\w-])--[a-z][\w-]+", added))
    return sorted(name for name in defined if uses(used, name))


def uses(text, name):
    """Does a text have a name as a whole?"""
    return re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", text) is not None
