"""What the README and the pages of the documentation hold: blocks, commands, links, numbers."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]

NOT_RUN = re.compile(r"^(?:% |<!-- )not run: (.+?)(?: -->)?$")
SAVED_AS = re.compile(r"[Ss]ave (?:this|it) as `([^`]+)`[^`]*$")


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Attributes:
        page: where it stands.
        line: of its first line, from 1.
        language: ``bash``, ``python``, …; ``cell`` of one that runs when the site is built.
        text: what it holds.
        not_run: why it cannot be run here; empty where it can.
        file: the file that it is saved as; empty where it is none.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str
    file: str

    @property
    def is_run(self) -> bool:
        """Whether the tests run it."""
        return self.language in ("bash", "python") and not self.not_run and not self.file


@cache
def tokens_of(page: Path) -> list[Token]:
    """A page as Markdown sees it, without its header."""
    text = page.read_text("utf-8")
    header = re.match(r"(---\n.*?\n---\n)?", text, re.DOTALL)
    assert header is not None
    blank = "\n" * header[0].count("\n")  # so that lines keep their numbers
    return MarkdownIt().enable("table").parse(blank + text[header.end() :])


def blocks_of(page: Path) -> list[Block]:
    """The blocks of code of a page, in order; those inside of directives are not among them."""
    lines = page.read_text("utf-8").splitlines()
    return [
        _block(page, lines, token)
        for token in tokens_of(page)
        if token.type == "fence" and (token.info.startswith("{code-cell}") or "{" not in token.info)
    ]


def _block(page: Path, lines: list[str], token: Token) -> Block:
    assert token.map is not None
    start = token.map[0]
    before = [line for line in lines[max(0, start - 6) : start] if line.strip()]
    reason = NOT_RUN.match(before[-1]) if before else None
    cell = token.info.startswith("{code-cell}")
    text = re.sub(r"\A(:.*\n|\n)+", "", token.content) if cell else token.content
    saved = SAVED_AS.search("\n".join(before[-2:]))
    file = saved[1] if saved and not cell else ""
    if cell and (written := re.match(r"%%writefile (\S+)\n", text)):
        file, text = written[1], text[written.end() :]
    return Block(
        page,
        start + 2,
        "cell" if cell else token.info.strip(),
        text,
        reason[1] if reason else "",
        file,
    )


def commands_of(block: Block) -> list[list[str]]:
    """The ``persona-nns`` commands of a block, as lists of their arguments.

    Variables of the shell have the values that the block gives them, and those of a loop their
    first. A block that prints exit codes has commands that are wrong, on purpose.
    """
    text = block.text
    if "$?" in text:
        return []
    if block.language == "cell":
        shell = re.findall(r"^!(.*)$", text, re.MULTILINE)
        text = text if text.startswith("%%bash") else "\n".join(shell)
    elif block.language != "bash":
        return []
    values: dict[str, str] = {}
    found: list[list[str]] = []
    for words in _statements(text, values):
        if "persona-nns" in words:
            after = words[words.index("persona-nns") + 1 :]
            ends = [k for k, word in enumerate(after) if set(word) <= set("|;&()<>")]
            # The number of a file that is redirected is a word of its own, as in 2>&1.
            if ends and after[ends[0]].startswith(">") and after[ends[0] - 1] in ("1", "2"):
                ends = [ends[0] - 1]
            found.append(after[: min(ends, default=len(after))])
    return found


def _statements(text: str, values: dict[str, str]) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        uncommented = re.sub(r"(^|\s)#.*", "", line)
        for part in re.split(r";\s|&&|\|\||\bdo\b", uncommented):
            if loop := re.match(r"\s*for (\w+) in (\S+)", part):
                values[loop[1]] = loop[2].strip("\"'")
                continue
            if given := re.match(r"\s*(\w+)=(\"[^\"]*\"|'[^']*'|\S*)\s*$", part):
                values[given[1]] = _expanded(given[2].strip("\"'"), values)
                continue
            lexer = shlex.shlex(_expanded(part, values), posix=True, punctuation_chars=True)
            lexer.whitespace_split, lexer.commenters = True, ""
            try:
                yield list(lexer)
            except ValueError:  # a quotation that goes on in the next part is no command of ours
                continue


def _expanded(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda at: values.get(at[1], at[0]), text)


def links_of(page: Path) -> Iterator[str]:
    """Where the links and images of a page lead to."""
    for token in tokens_of(page):
        for part in token.children or ():
            if part.type in ("link_open", "image"):
                yield str(part.attrGet("href") or part.attrGet("src"))


@cache
def anchors_of(page: Path) -> set[str]:
    """What a link may name on a page: its headings, as GitHub and MyST write them."""
    tokens = tokens_of(page)
    headings = [
        following.content for token, following in pairwise(tokens) if token.type == "heading_open"
    ]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def prose_of(page: Path) -> str:
    """What a page says outside of code: its text and tables, without code spans and addresses."""
    said = [
        part.content
        for token in tokens_of(page)
        for part in token.children or ()
        if part.type == "text"
    ]
    return "\n".join(said)


def decimals_in(text: str) -> set[str]:
    """Decimal numbers of a text; versions, names of models and numbers of articles are none."""
    text = re.sub(r"(arXiv[: ]?|NDIF |Python )\d+\.\d+", "", text)
    return set(re.findall(r"(?<![\w.])(?<![A-Za-z]-)\d+\.\d+(?![\w.])", text))
