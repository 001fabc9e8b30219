"""What a query gives away, on eight small pull requests in the manner of real ones: 56 texts."""

import difflib
import importlib

import pytest

rules = importlib.import_module("01_build_queries")


def diff(path, old, new):
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}")
    return f"diff --git a/{path} b/{path}\n" + "".join(lines)


def pull(title, path, old, new, test_path, old_test, new_test):
    """A pull request as the stage knows it: its Solution."""
    tests = diff(test_path, old_test, new_test)
    material = {"secret": diff(path, old, new), "tests": tests, "asked": rules.asked_texts(new_test, tests)}
    return rules.Solution(material, old, title)


DURATION_OLD = '''import re

UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_duration(text):
    """Seconds of a text such as 90s."""
    match = re.fullmatch(r"(\\d+)([smh])", text)
    if match is None:
        raise ValueError(text)
    return int(match[1]) * UNITS[match[2]]
'''
DURATION_NEW = '''import re

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PART_PATTERN = re.compile(r"(\\d+)\\s*([smhd])")


def parse_duration(text):
    """Seconds of a text such as 1h 30m."""
    pieces = _PART_PATTERN.findall(text)
    leftover = _PART_PATTERN.sub("", text).strip()
    if not pieces or leftover:
        raise ValueError(f"cannot read the duration {text!r}")
    return sum(int(amount) * UNITS[unit] for amount, unit in pieces)
'''
DURATION_TEST = (
    "from times import parse_duration\n\ndef test_seconds():\n    assert parse_duration('90s') == 90\n"
)
DURATION_TEST_NEW = (
    DURATION_TEST
    + """
def test_several_units():
    assert parse_duration("1h 30m") == 5400
    assert parse_duration("1d") == 86400

def test_refuses():
    with pytest.raises(ValueError, match="cannot read the duration"):
        parse_duration("soon")
"""
)
STYLE_OLD = """from term import codes


def style(text, fg=None, bold=False):
    bits = []
    if fg:
        bits.append(codes[fg])
    if bold:
        bits.append(codes["bold"])
    return "".join(bits) + text


def secho(text, **styles):
    print(style(text, **styles))
"""
STYLE_NEW = STYLE_OLD.replace("if fg:", "if fg is not None:").replace("if bold:", "if bold is not False:")
STYLE_TEST = "from term import style\n\ndef test_red():\n    assert style('a', fg='red')\n"
STYLE_TEST_NEW = STYLE_TEST + "\ndef test_black():\n    assert style('a', fg=0) == '\\x1b[30ma'\n"
RECORD_OLD = """import copy


def _convert(value):
    if type(value) in (int, str, bool):
        return value
    return copy.deepcopy(value)


def asdict(record, recurse=True):
    result = {}
    for name in record.fields:
        result[name] = _convert(getattr(record, name))
    return result
"""
RECORD_NEW = """import copy

_ATOMIC_TYPES = frozenset({type(None), bool, int, float, str, bytes})


def _convert(value):
    if value.__class__ in _ATOMIC_TYPES:
        return value
    return copy.deepcopy(value)


def asdict(record, recurse=True, *, keep_none=True):
    result = {}
    for name in record.fields:
        found = getattr(record, name)
        if found is None and not keep_none:
            continue
        result[name] = _convert(found)
    return result
"""
RECORD_TEST = "from records import asdict\n\ndef test_asdict():\n    assert asdict(POINT) == {'x': 1}\n"
RECORD_TEST_NEW = RECORD_TEST + "\ndef test_none():\n    assert asdict(POINT, keep_none=False) == {}\n"
CALL_OLD = """def bind(function, args):
    needed = function.arity
    if len(args) < needed:
        raise TypeError("bad call")
    return function, args
"""
CALL_NEW = """def bind(function, args):
    needed = function.arity
    missing_count = needed - len(args)
    if missing_count > 0:
        plural_suffix = "" if missing_count == 1 else "s"
        raise TypeError(f"{function.name}() missing {missing_count} argument{plural_suffix} (takes {needed})")
    return function, args
"""
CALL_TEST = "def test_bind():\n    assert bind(F, [1])\n"
CALL_TEST_NEW = (
    CALL_TEST
    + """
def test_says_how_many():
    with pytest.raises(TypeError, match=r"evolve\\(\\) missing 1 argument \\(takes 2\\)"):
        bind(EVOLVE, [1])
"""
)
WIDTH_OLD = """import textwrap


def build_parser(parser):
    parser.add_argument("--color")
    return parser


def render(lines, options):
    return "\\n".join(lines)
"""
WIDTH_NEW = """import textwrap


def build_parser(parser):
    parser.add_argument("--color")
    parser.add_argument("--max-width", type=int, default=80)
    return parser


def render(lines, options):
    wrapper = textwrap.TextWrapper(width=options.max_width, break_long_words=False)
    return "\\n".join(wrapper.fill(line) for line in lines)
"""
WIDTH_TEST = "def test_render():\n    assert run(['--color', 'no']) == 'a'\n"
WIDTH_TEST_NEW = WIDTH_TEST + "\ndef test_width():\n    assert run(['--max-width', '3']) == 'a b\\nc'\n"
COOKIE_OLD = """function parse (str) {
  var obj = {}
  var pairs = str.split(';')
  for (var i = 0; i < pairs.length; i++) {
    var eq = pairs[i].indexOf('=')
    obj[pairs[i].slice(0, eq).trim()] = pairs[i].slice(eq + 1).trim()
  }
  return obj
}
module.exports = parse
"""
COOKIE_NEW = """function parse (str) {
  var obj = Object.create(null)
  var pairs = str.split(';')
  for (var i = 0; i < pairs.length; i++) {
    var eq = pairs[i].indexOf('=')
    var rawValue = pairs[i].slice(eq + 1).trim()
    if (rawValue.charCodeAt(0) === 0x22) rawValue = rawValue.slice(1, -1)
    obj[pairs[i].slice(0, eq).trim()] = rawValue
  }
  return obj
}
module.exports = parse
"""
COOKIE_TEST = "it('parses', function () {\n  assert.deepEqual(parse('a=b'), {a: 'b'})\n})\n"
COOKIE_TEST_NEW = (
    COOKIE_TEST
    + """it('unquotes', function () {
  assert.deepEqual(parse('a="b c"'), {a: 'b c'})
})
"""
)
ROUTE_OLD = """package mux

func (r *Router) Match(path string) bool {
	for _, route := range r.routes {
		if route.path == path {
			return true
		}
	}
	return false
}
"""
ROUTE_NEW = """package mux

import "strings"

func (r *Router) Match(path string) bool {
	trimmedPath := strings.TrimSuffix(path, "/")
	for _, route := range r.routes {
		if route.path == path || r.lenient && strings.TrimSuffix(route.path, "/") == trimmedPath {
			return true
		}
	}
	return false
}
"""
ROUTE_TEST = 'func TestMatch(t *testing.T) {\n\tif !New().Match("/a") {\n\t\tt.Fatal()\n\t}\n}\n'
ROUTE_TEST_NEW = (
    ROUTE_TEST
    + """func TestLenient(t *testing.T) {
	if err := New(Lenient).Check("/a/"); err == nil || err.Error() != "no route for this path" {
		t.Fatal(err)
	}
}
"""
)
SLUG_OLD = """import re


def slugify(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower())
"""
SLUG_NEW = """import re
import unicodedata


def _strip_accents(text):
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def slugify(text):
    return re.sub(r"[^a-z0-9]+", "-", _strip_accents(text).lower()).strip("-")
"""
SLUG_TEST = "def test_slug():\n    assert slugify('A b') == 'a-b'\n"
SLUG_TEST_NEW = SLUG_TEST + "\ndef test_accents():\n    assert slugify('Crème brûlée!') == 'creme-brulee'\n"

PULLS = {
    "duration": pull(
        "Parse durations of several units and days",
        "times.py",
        DURATION_OLD,
        DURATION_NEW,
        "tests/test_times.py",
        DURATION_TEST,
        DURATION_TEST_NEW,
    ),
    "style": pull(
        "Accept colour number zero in style",
        "src/term/style.py",
        STYLE_OLD,
        STYLE_NEW,
        "tests/test_style.py",
        STYLE_TEST,
        STYLE_TEST_NEW,
    ),
    "record": pull(
        "Add keep_none to asdict and make it faster",
        "src/records/_funcs.py",
        RECORD_OLD,
        RECORD_NEW,
        "tests/test_records.py",
        RECORD_TEST,
        RECORD_TEST_NEW,
    ),
    "call": pull(
        "Say how many arguments are missing",
        "bind.py",
        CALL_OLD,
        CALL_NEW,
        "tests/test_bind.py",
        CALL_TEST,
        CALL_TEST_NEW,
    ),
    "width": pull(
        "Add an option for the width of the output",
        "cli/render.py",
        WIDTH_OLD,
        WIDTH_NEW,
        "tests/test_cli.py",
        WIDTH_TEST,
        WIDTH_TEST_NEW,
    ),
    "cookie": pull(
        "Strip the quotes around cookie values",
        "index.js",
        COOKIE_OLD,
        COOKIE_NEW,
        "test/parse.js",
        COOKIE_TEST,
        COOKIE_TEST_NEW,
    ),
    "route": pull(
        "Lenient routers ignore a slash at the end",
        "mux.go",
        ROUTE_OLD,
        ROUTE_NEW,
        "mux_test.go",
        ROUTE_TEST,
        ROUTE_TEST_NEW,
    ),
    "slug": pull(
        "Turn accented letters into plain ones",
        "text/slug.py",
        SLUG_OLD,
        SLUG_NEW,
        "tests/test_slug.py",
        SLUG_TEST,
        SLUG_TEST_NEW,
    ),
}

# (pull request, what is leaked or None, text)
TEXTS = [
    ("duration", None, "parse_duration only takes one unit. I want to write 1h 30m or 1d and get seconds."),
    (
        "duration",
        None,
        "Durations of several parts fail. What cannot be read must raise ValueError with a message "
        'that begins with "Cannot read the duration" and shows the text.',
    ),
    (
        "duration",
        None,
        "Allow spaces between the parts of a duration, add days, and refuse text with anything else.",
    ),
    (
        "duration",
        "a line",
        "return sum(int(amount) * UNITS[unit] for amount, unit in pieces) is what I expect",
    ),
    (
        "duration",
        "renamed",
        "It could do `return sum(int(n) * UNITS[u] for n, u in parts)` on what it found.",
    ),
    ("duration", "re-cased name", "Keep a compiled partPattern for the pieces of the text."),
    (
        "duration",
        "the title",
        "Parse durations of several units and days. They are needed for our time sheets.",
    ),
    ("duration", "a place", "In times.py the durations are too simple: 1h 30m is refused."),
    (
        "style",
        None,
        "style ignores colour number 0: text with fg=0 comes out without any code, it should be black.",
    ),
    (
        "style",
        None,
        "Passing zero as fg to secho prints plain text. Zero is a valid colour and should be used.",
    ),
    ("style", "half a line", "style loses the colour 0; change `if fg:` to `if fg is not None`."),
    ("style", "a place", "The condition in the function style is wrong, so fix style to take 0."),
    ("style", "a place", "There is a bug in src/term/style.py: colour zero is dropped."),
    (
        "record",
        None,
        "asdict is slow for large records of plain values, and I need keep_none=False, which leaves out "
        "fields that are None.",
    ),
    (
        "record",
        None,
        "Give asdict a keyword keep_none, true by default. When false, fields without a value are left "
        "out of the result; None inside nested values stays.",
    ),
    (
        "record",
        "re-cased name",
        "Plain values (see atomic_types) need no copying, and asdict should take keep_none.",
    ),
    (
        "record",
        "re-cased name",
        "asdict(keep_none=False) leaves None out; keep a set `ATOMIC_TYPES` of plain types.",
    ),
    (
        "record",
        "a means",
        "asdict should take keep_none; use a frozenset of the plain types to make it fast.",
    ),
    ("record", "an inner function", "asdict copies too much because _convert is slow; add keep_none to it."),
    ("record", "a place", "Please extend asdict in src/records/_funcs.py with keep_none."),
    ("record", "a line", "Skip it when `found is None and not keep_none`, so asdict gives a smaller dict."),
    (
        "record",
        "renamed",
        "for key in record.fields: if (value := getattr(record, key)) is None, skip; the rest goes "
        "through `result[key] = _convert(value)`",
    ),
    (
        "call",
        None,
        'When arguments are missing, the TypeError says only "bad call". It should say which function, how '
        "many are missing and how many it takes, such as `evolve() missing 1 argument (takes 2)`.",
    ),
    (
        "call",
        None,
        'bind must say "NAME() missing 1 argument (takes N)", with the plural where it is more than one.',
    ),
    (
        "call",
        "a new name",
        "Compute missing_count before raising, and say evolve() missing 1 argument (takes 2).",
    ),
    (
        "call",
        "renamed",
        'It needs `suffix = "" if count == 1 else "s"` for the message evolve() missing 1 argument.',
    ),
    ("call", "a line", "missing count = needed - len(args), then `if missing_count > 0:` raise the error"),
    (
        "width",
        None,
        "Long lines run out of my terminal. Please add --max-width N (80 if not given): words are moved to "
        "the next line, a word that is longer than the width stays whole.",
    ),
    (
        "width",
        None,
        "The command needs --max-width, an integer, so that output can be piped into narrow columns.",
    ),
    ("width", "a means", "Add --max-width and wrap every line with TextWrapper."),
    (
        "width",
        "a line",
        "Add --max-width: `textwrap.TextWrapper(width=options.max_width, break_long_words=False)`.",
    ),
    ("width", "a place", "Add --max-width; you have to modify build_parser and render for that."),
    ("width", "the title", "add an option for the width of the output, please, called --max-width"),
    (
        "width",
        "half a line",
        '--max-width is missing: parser.add_argument("--max-width", type=int, default=80)',
    ),
    ("cookie", None, 'Values in double quotes keep their quotes: a="b c" should give b c without them.'),
    (
        "cookie",
        None,
        "Cookie headers from some proxies quote their values, RFC 6265 allows it. The parsed value should "
        "not have the surrounding quotes; quotes inside a value stay.",
    ),
    (
        "cookie",
        "a line",
        "if (rawValue.charCodeAt(0) === 0x22) rawValue = rawValue.slice(1, -1) removes the quotes",
    ),
    (
        "cookie",
        "renamed",
        "I would do `if (value.charCodeAt(0) === 0x22) value = value.slice(1, -1)` for quotes.",
    ),
    ("cookie", "a means", "Quoted values should be unquoted; compare the first character with charCodeAt."),
    ("cookie", "a place", "The parser in index.js leaves the quotes around values."),
    ("cookie", "a new name", "Take the quotes off raw_value before it is stored."),
    (
        "route",
        None,
        "With Lenient a router should also find /a when the request is for /a/, and the other way round. "
        'What is not found is "no route for this path".',
    ),
    (
        "route",
        None,
        "Requests with a slash at the end get a 404. A lenient router ignores that slash; others do not.",
    ),
    ("route", "a means", "A lenient router should call TrimSuffix on both paths before it compares them."),
    (
        "route",
        "a line",
        'strings.TrimSuffix(route.path, "/") == trimmedPath would make the lenient router match',
    ),
    ("route", "renamed", '`short := strings.TrimSuffix(path, "/")` first, for lenient routers.'),
    ("route", "the title", "Lenient routers ignore a slash at the end, ours does not."),
    ("slug", None, "slugify drops accented letters: Crème brûlée! should become creme-brulee."),
    (
        "slug",
        None,
        "Slugs lose letters with accents and may end with a dash. Keep the plain letter, no dash at the end.",
    ),
    ("slug", "a means", "Accents get lost; import unicodedata for that and keep the base letter."),
    ("slug", "a new name", "Add a helper strip_accents so that accented letters are kept."),
    ("slug", "a line", '"".join(letter for letter in decomposed if not unicodedata.combining(letter))'),
    (
        "slug",
        "renamed",
        '`"".join(c for c in split if not unicodedata.combining(c))` keeps the plain letters.',
    ),
    (
        "slug",
        "a means",
        "Normalise the text (NFKD) and leave out what is combining; the function normalize does it.",
    ),
    ("duration", "the file", "Please edit TIMES.PY for that."),
    ("duration", "a new name", "Put a PartPattern at the top of the module."),
    ("style", "a line", "Compare the colour with None: if fg is not None."),
    ("style", "a line", "Il faut remplacer `if fg:` par `if fg is not None:`."),
    ("record", "a means", "Test value.__class__ in a set instead of isinstance."),
    ("cookie", "a line", "If charCodeAt(0) is 0x22, slice off both ends."),
    ("slug", "a means", "用 unicodedata.normalize 把文字分解,然後去掉重音。"),
    ("style", None, "When fg is 0 the text is plain; None should still mean that no colour was asked for."),
    ("cookie", None, 'A value in double quotes comes out without them; a key "__proto__" disturbs nothing.'),
    ("slug", None, "slugify of Café gives caf; I expect cafe. Nothing else of the result changes."),
    ("call", "only an idea", "Compute the missing count as what is needed minus len(args)."),
    ("slug", "only an idea", "Split every accented letter into the letter and its mark, and drop the marks."),
    (
        "record",
        "only an idea",
        "Remember which types never need copying instead of asking each time, for keep_none.",
    ),
]


def test_leak_table_precision_and_recall(capsys):
    """The rules refuse nearly every leaky text and no clean one; mere ideas are left to the judge."""
    caught, missed, wrong = [], [], []
    for name, leak, text in TEXTS:
        found = list(PULLS[name].leaks(text))
        if found and leak:
            caught.append((name, leak))
        elif leak:
            missed.append((name, leak, text))
        elif found:
            wrong.append((name, text, found))
    precision = len(caught) / (len(caught) + len(wrong))
    recall = len(caught) / (len(caught) + len(missed))
    with capsys.disabled():
        print(
            f"\n{len(TEXTS)} texts on {len(PULLS)} pull requests, {len(caught) + len(missed)} leaky: "
            f"precision {precision:.2f}, recall {recall:.2f}"
        )
    assert len(TEXTS) >= 40 and not wrong
    assert {leak for _, leak, _ in missed} <= {"only an idea"}, missed


@pytest.mark.parametrize(
    "name, asked",
    [
        ("duration", ["cannot read the duration"]),
        ("call", ["evolve() missing 1 argument (takes 2)"]),
        ("style", []),
        ("route", ["no route for this path"]),
    ],
)
def test_texts_that_tests_ask_for_are_read_as_a_person_would(name, asked):
    assert [" ".join(text.split()) for text in PULLS[name].asked] == asked


def test_form_feeds_between_the_tests_move_no_line():
    old = "import call\n\x0c\ndef test_a():\n    pass\n\x0c\ndef test_b():\n"
    new = old + "    assert call.f() == 'no such thing here'\n"
    assert rules.asked_texts(new, diff("test_call.py", old, new)) == ["no such thing here"]


def test_a_text_full_of_signs_and_an_inner_function_may_be_given_where_the_tests_use_them():
    line = '    return fetch("https://[::ffff:192.168.0.1]/") or _split_parts(url)\n'
    old = "def get(url):\n    return None\n\n\ndef _split_parts(url):\n    return url\n"
    new = old.replace("    return None\n", line).replace("return url", "return url.parts")
    test = "def test():\n    assert get(0) == '::ffff:192.168.0.1'\n"
    test += "    assert get(1) == 'https://[::ffff:192.168.0.1]/'\n    assert _split_parts(2)\n"
    solution = pull("Split", "get.py", old, new, "test_get.py", "", test)
    assert solution.asked == ["::ffff:192.168.0.1", "https://[::ffff:192.168.0.1]/"]
    assert not list(solution.leaks("The address https://[::ffff:192.168.0.1]/ goes to _split_parts."))
    assert list(solution.leaks('It is `fetch("https://` and so on; edit _split_parts.')) == [
        "leaks a new name of the solution: fetch",
        f"repeats a line of the solution: {line.strip()}",
        "says which function to change: _split_parts",
    ]


def test_of_texts_that_overlap_nothing_is_left_to_be_a_leak():
    old = "def get(path):\n    return quote(path, safe='/')\n"
    new = old.replace("safe='/'", 'safe=DELIMS + ":/[]@"')
    texts = "/!$&'()*+,;= abc ABC 123 :/[]@", "!$&'()*+,;= abc ABC 123 :/[]@?#", "abc ABC 123 :/[]@"
    test = "def test():\n" + "".join(f"    assert get(1) == {text!r}\n" for text in texts)
    solution = pull("Quote less", "get.py", old, new, "test_get.py", "", test)
    assert solution.asked == list(texts)
    assert not list(solution.leaks(" ".join(f'It gives "{text}".' for text in texts)))


@pytest.mark.parametrize(
    "query, given",
    [("It says “Evolve() missing 1 argument\n(takes 2)”.", True), ("evolve() missing one argument", False)],
)
def test_a_text_is_given_whatever_its_quotes_case_and_line_breaks(query, given):
    assert rules.says(query, PULLS["call"].asked[0]) == given
