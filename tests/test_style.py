"""The word list of the house style (CONTRIBUTING.md): pages, docstrings, help and messages use the usual words."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "RESULTS.md"]
    if not path.name.endswith(".zh.md") and path.name != "reference.md"  # the reference comes from help strings
]
MODULES = sorted((ROOT / "src").rglob("*.py"))
DATA = sorted((ROOT / "src").rglob("*.toml"))

# Patterns are narrow if a word has a legitimate use too.
NAMES = {  # as their owners write them; case matters
    r"\bthe hub\b|\bHugging Face hub\b": "the Hugging Face Hub",
    r"(?<![\w`/.-])transformers (?:4|5)\b(?!\.\d)": "Transformers 4, Transformers 5",
}
WORDS = NAMES | {
    r"\bhence\b|\bthus\b|\blest\b|\bthereof\b|\btherein\b|\bwhilst\b": "therefore, so, or a new sentence",
    r"\blikelier\b|\blikeliest\b": "more likely, most likely",
    r"\bbehind\b(?! (?:a|the|an) (?:server|proxy|firewall|endpoint)\b)": "after",
    r"\bso many\b|\bso long\b(?! as\b)": "that many, that long, or a number",
    r"\bwhat is no\b|\b(?:is|are) no (?:numbers?|texts?|URL|dict|list|folder|file)\b": "invalid, or: is not a ...",
    r"\b(?:goes?|does not go) with\b": "requires, or: can be used with",
    r"\bmak(?:es?|ing) (?:place|room)\b": "is evicted, exits",
    r"\bfewest\b|(?<!\bat )\bleast\b(?!\s+(?:recently|likely))": "minimum, at least, smallest",
    r"\bmost (?:tokens|records|rows|characters|bytes|memory|requests)\b(?! of\b)": "maximum number of",
    r"\bgreatest\b|(?<!to )\bnearest\b(?! (?:even|neighbor))": "highest, closest",
    r"\blies?\b|\blay beside\b|\bstands?\b(?! (?:for|in for)\b)": "is",
    r"(?<!logits )\bprocessors?\b": "CPU",
    r"(?<!-)\bfolders?\b": "directory",
    r"\bof one's own\b|\bone's own\b": "your own",
    r"\b(?:a|the|each|every|this|that) text (?:is|has) no\b": "string without",
    r"\bspeaks? the OpenAI protocol\b|\bOpenAI protocol\b": "OpenAI-compatible, OpenAI API",
    r"\bit is said\b|\bsaid otherwise\b|\bsays nothing\b": "prints, sets, or a sentence with an actor",
    r"\bquick(?:er|est|ly)?\b(?! (?:start|brown)\b)": "fast",
    r"\b(?:nothing|all|none|any|anything|everything)(?: \w+)? but\b|\bbut (?:for|one|in text)\b|\bhas but\b": "except",
    r"\b[Ww]here (?:it|there) (?:is|has) (?:one|none|no)\b": "if there is",
    r"\bkept warm\b|\bkeeps? (?:\w+ ){0,2}warm\b|\bstays? warm\b": "keep loaded",
    r"\bcuts? (?:(?:its|the|an) )?answers? out\b|\bcut out of (?:it|the text)\b": "extracts",
    r"\bmade for (?:it|this|that|the task)\b": "task-specific, trained for the task",
    r"\bof like length\b|\bneighbou?rs in length\b": "of similar length (length bucketing)",
    r"\b(?:tokens?|records?|calls?|lines?|answers?) a (?:second|record|call|row)\b": "per second, per record",
    r"\bmemory (?:ran|runs) out\b": "out of memory",
    r"\bcolour|\blicence|\blearnt\b|\bneighbour|\bbehaviour|\bfavour|\bcentre\b|\bharbour": "US spelling",
    r"\b\w*(?:organis|summaris|recognis|tokenis|initialis|normalis|optimis|quantis|serialis)(?:e|es|ed|ing|ation)\b": (
        "US spelling: -ize"
    ),
}


def prose(markdown: str) -> str:
    """Return a page without its code; lines keep their numbers."""
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    text = re.sub(r"^```.*?^```$", blank, markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "`x`", text)
    return re.sub(r"\]\([^)]*\)", "](x)", text)


def strings(module: Path) -> list[tuple[int, str]]:
    """Return the docstrings, the help strings and the messages of a module, with their lines."""
    found = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            found.append((node.body[0].lineno, re.sub(r"`[^`\n]*`", "`x`", text)))
        if isinstance(node, ast.Call) and _is_spoken(node.func):
            found += _constants([*node.args, *(keyword.value for keyword in node.keywords)])
        elif isinstance(node, ast.Call):
            found += _constants([keyword.value for keyword in node.keywords if keyword.arg in ("help", "hint")])
    return found


def _is_spoken(function: ast.expr) -> bool:
    """Whether the arguments of a call are read by people: an exception, or a line on stderr."""
    if isinstance(function, ast.Attribute):
        return isinstance(function.value, ast.Name) and function.value.id == "console"
    return isinstance(function, ast.Name) and (function.id.endswith("Error") or function.id == "Failure")


def _constants(nodes: list[ast.expr]) -> list[tuple[int, str]]:
    return [
        (inner.lineno, inner.value)
        for node in nodes
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    ]


def violations(text: str, place: str, first_line: int = 1) -> list[str]:
    """Return the words of a text that the house style avoids."""
    return [
        f"{place}:{first_line + text.count(chr(10), 0, match.start())}: {match[0]!r} -> {better}"
        for pattern, better in WORDS.items()
        for match in re.finditer(pattern, text, 0 if pattern in NAMES else re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_page_uses_words_of_house_style(page):
    text = prose(page.read_text(encoding="utf-8"))
    text = re.sub(r"^\d+\. Avoid words that.*?(?=^\d+\. )", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not violations(text, page.name)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT / "src" / "llmcli")))
def test_module_uses_words_of_house_style(module):
    assert not [
        violation for line, text in strings(module) for violation in violations(text, module.name, first_line=line)
    ]


@pytest.mark.parametrize("file", DATA, ids=lambda path: path.name)
def test_data_file_uses_words_of_house_style(file):
    comments = "\n".join(
        re.sub("#   .* = .*", "", line) if line.startswith(("#", "description")) else ""
        for line in file.read_text(encoding="utf-8").splitlines()
    )
    assert not violations(comments, file.name)


@pytest.mark.parametrize(
    ("text", "is_rejected"),
    [
        ("Print the likeliest token.", True),
        ("The worker stands behind a socket.", True),
        ("A model behind a server.", False),
        ("At least 3 records.", False),
        ("the least recently used model", False),
        ("Quick start", False),
        ("`·` stands for a space", False),
        ("The Hugging Face Hub", False),
        ("Results lie in the folder.", True),
    ],
)
def test_word_list_examples_are_judged(text, is_rejected):
    assert bool(violations(text, "x")) is is_rejected
