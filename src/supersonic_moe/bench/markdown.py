"""Generated Markdown: a table, and where the numbers of a results file come from."""

from __future__ import annotations

from typing import Any


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def origin(content: dict[str, Any]) -> str:
    commit, _, dirty = content["commit"].partition("-")
    commit = f"{commit[:12]}{'-' + dirty if dirty else ''}"
    return f"{content['device']}, torch {content['torch']}, commit `{commit}`, {content['date'][:10]}"
