"""Shows the doctests of docstrings as code in the reference."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts a fence around every paragraph that opens with a prompt."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring as it is shown; the source stays."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(
                lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value
            )
