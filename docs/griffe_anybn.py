"""Docstrings for the site: doctests become code, and names of anybn in backticks become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", re.M)
NAME = re.compile(r"(?<![`\[])`(?:anybn\.)?([A-Za-z_0-9]+)`(?!`)")


class Docstrings(griffe.Extension):
    """What mkdocstrings asks griffe to load goes through here."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self.public = {str(name) for name in pkg.exports or ()} - {"backends"}  # a function and a package
        self._visit(pkg)

    def _visit(self, obj: Any) -> None:
        if obj.docstring is not None:
            owner = obj if obj.is_class else obj.parent
            methods = owner.members if owner is not None and owner.is_class else {}
            self.links = {name: f"anybn.{name}" for name in self.public}
            self.links |= {name: member.path for name, member in methods.items() if not name.startswith("_")}
            obj.docstring.value = self._prepared(obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self._visit(member)

    def _prepared(self, text: str) -> str:
        parts, end = [], 0
        for match in DOCTEST.finditer(text):
            indent, code = match[1], re.sub(r" *# doctest:.*$", "", match[0], flags=re.M)
            parts += [self._linked(text[end : match.start()]), f"{indent}```pycon\n{code}\n{indent}```"]
            end = match.end()
        return "".join([*parts, self._linked(text[end:])])

    def _linked(self, text: str) -> str:
        def link(match: re.Match[str]) -> str:
            target = self.links.get(match[1])
            return match[0] if target is None else f"[{match[0]}][{target}]"

        return NAME.sub(link, text)
