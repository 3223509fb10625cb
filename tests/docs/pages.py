"""The Markdown pages of the site, and the code blocks in them."""

from __future__ import annotations

import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
PAGES = sorted(path.relative_to(ROOT).as_posix() for pattern in HOOKS["PAGES"] for path in ROOT.glob(pattern))

NOT_RUN = re.compile(r"<!--\s*not run\b:?(.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the number of its first line in the page.

    not_run: what the comment before it, ``<!-- not run: REASON -->``, says; None where there is none.
    output: the text block that follows at once, which is what it prints; None where there is none.
    """

    language: str
    code: str
    line: int
    not_run: str | None
    output: str | None

    def commands(self) -> list[list[str]]:
        """Return the words of each command of a bash block, without comments and assignments of the environment."""
        lines = self.code.replace("\\\n", " ").splitlines()
        words = (shlex.split(line, comments=True) for line in lines)
        commands = ([word for i, word in enumerate(line) if i or not re.match(r"\w+=", word)] for line in words)
        return [command for command in commands if command]


def tokens_of(page: str) -> list[Token]:
    """Return what a page consists of, as a code host reads it."""
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def blocks_of(page: str) -> list[Block]:
    """Return all code blocks of a page in their order; one that is only indented has no language."""
    tokens = tokens_of(page)
    blocks = []
    for i, token in enumerate(tokens):
        if token.type not in ("fence", "code_block"):
            continue
        before = tokens[i - 1] if i else None
        after = tokens[i + 1] if i + 1 < len(tokens) else None
        comment = NOT_RUN.search(before.content) if before and before.type == "html_block" else None
        prints = after is not None and after.type == "fence" and after.info.strip() == "text"
        blocks.append(
            Block(
                language=token.info.strip(),
                code=token.content,
                line=token.map[0] + (2 if token.type == "fence" else 1),
                not_run=comment and comment[1].strip(),
                output=after.content if prints else None,
            )
        )
    return blocks


def inline_commands(page: str) -> list[list[str]]:
    """Return the words of each command that a page has in the middle of a sentence."""
    children = (child for token in tokens_of(page) for child in token.children or [])
    code = (child.content for child in children if child.type == "code_inline")
    return [shlex.split(text) for text in code if re.match(r"(lowmem|make) [a-z]", text)]
