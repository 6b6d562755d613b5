"""Shows the `>>>` lines of docstrings as code: a Griffe extension that puts a fence around each run of them."""

import re
from typing import Any

import griffe

RUN = re.compile(r"(?:^[ \t]*>>> .*\n?(?:^[ \t]*\S.*\n?)*)+", re.M)  # a prompt and what follows, up to an empty line


def fenced(text: str) -> str:
    """Return a docstring with a fence around each run of prompts and what they print."""

    def fence(found: re.Match[str]) -> str:
        lines = found[0].rstrip("\n").splitlines()
        indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
        end = "\n" if found[0].endswith("\n") else ""
        return "\n".join([f"{indent}```python", *lines, f"{indent}```"]) + end

    return RUN.sub(fence, text)


class Doctests(griffe.Extension):
    """Fences the prompts of every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None and "```" not in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
