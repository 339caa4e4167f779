"""Strict reading of tables into frozen dataclasses: all problems are collected, none is mended."""

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

ByteSize = NewType("ByteSize", int)
"""Bytes; written as an integer or as ``"220 MiB"``."""

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)\s*", re.IGNORECASE)

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What a value must hold beyond its type; written as ``Annotated[int, Rule(...)]``."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("be positive", lambda value: value > 0)
NOT_NEGATIVE = Rule("be zero or more", lambda value: value >= 0)
AT_LEAST_ONE = Rule("be at least 1", lambda value: value >= 1)
SHARE = Rule("lie strictly between 0 and 1", lambda value: 0 < value < 1)
NOT_EMPTY = Rule("not be empty", lambda value: len(value) > 0)


class _RefusedError(Exception):
    """A value does not fit; the argument is the rule it breaks, and a suggestion or nothing."""

    def __init__(self, rule: str, advice: str = "") -> None:
        super().__init__(rule)
        self.rule, self.advice = rule, advice


def parse_bytes(value: object) -> int:
    """Bytes of an integer or of a number with a unit.

    >>> parse_bytes("1.5 GiB"), parse_bytes("200 MB"), parse_bytes(4096)
    (1610612736, 200000000, 4096)

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError('be bytes: an integer, or a number with a unit such as "220 MiB", "1.5 GiB" or "300 MB"')
    return int(float(match[1]) * _UNITS[match[2].lower()])


def suggestion(word: str, known: Iterable[str]) -> str:
    """The advice that ends a message about an unknown word.

    >>> suggestion("ronds", ["seed", "rounds"])
    "did you mean 'rounds'? known: rounds, seed"
    """
    known = sorted(known)
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}"


def show(value: object) -> str:
    """A value as TOML writes it."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(entry) for entry in value) + "]"
    return str(value)


def convert(value: object, hint: Any) -> object:
    """The value as the annotated type.

    Raises:
        _RefusedError: It is of another type, or breaks a rule of the annotation.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        result = convert(value, arguments[0])
        for rule in arguments[1:]:
            if result is not None and not rule.holds(result):
                raise _RefusedError(rule.text)
        return result
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments)
    if origin is Literal:
        return _convert_literal(value, arguments)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _RefusedError(f"be a list, each entry of which must {_describe(arguments[0])}")
        return tuple(convert(entry, arguments[0]) for entry in value)
    return _convert_plain(value, hint)


def _convert_union(value: object, arguments: Sequence[Any]) -> object:
    rules: list[str] = []
    if value is None or (value == "none" and type(None) in arguments):
        return None
    for hint in arguments:
        if hint is type(None):
            rules.append('be "none"')
            continue
        try:
            return convert(value, hint)
        except _RefusedError as refusal:
            if get_origin(hint) is Literal:
                raise
            rules.append(refusal.rule)
    raise _RefusedError(" or ".join(rules))


def _convert_literal(value: object, known: Sequence[Any]) -> object:
    if value in known and type(value) in {type(entry) for entry in known}:
        return value
    advice = suggestion(value, known) if isinstance(value, str) else ""
    raise _RefusedError(f"be one of {', '.join(show(entry) for entry in known)}", advice.partition(" known:")[0])


def _convert_plain(value: object, hint: Any) -> object:
    if hint is ByteSize:
        try:
            return ByteSize(parse_bytes(value))
        except ValueError as error:
            raise _RefusedError(str(error)) from error
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise _RefusedError(_describe(hint))
    return value


def _describe(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _describe(get_args(hint)[0])
    names = {int: "be an integer", float: "be a number", str: "be a string", bool: "be true or false"}
    return names.get(hint, "be bytes" if hint is ByteSize else "be a list")


def fields_of(cls: type[Any], *, hidden: Iterable[str] = ()) -> dict[str, Any]:
    """Field -> annotation of a dataclass, without the hidden ones."""
    hints = get_type_hints(cls, include_extras=True)
    hidden = frozenset(hidden)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.name not in hidden}


def read(
    cls: type[Any],
    table: Mapping[str, object],
    where: Callable[[str], str],
    problems: list[str],
    *,
    rules: Mapping[str, Rule] = types.MappingProxyType({}),
    hidden: Iterable[str] = (),
) -> dict[str, object]:
    """Converted values of a table's keys that are fields of the dataclass; what is wrong is appended to ``problems``.

    Args:
        cls: The dataclass.
        table: Keys and values as TOML gives them.
        where: Key -> its place in words, such as ``recipe.toml: run.rounds``.
        problems: Grows by one sentence for each problem.
        rules: Key -> a rule beyond its annotation.
        hidden: Fields that a recipe may not set.
    """
    hints = fields_of(cls, hidden=hidden)
    values: dict[str, object] = {}
    for key, value in table.items():
        if key not in hints:
            problems.append(f"{where(key)} must be a known key, got {show(value)}; {suggestion(key, hints)}")
            continue
        try:
            hint = Annotated[hints[key], rules[key]] if key in rules else hints[key]
            values[key] = convert(value, hint)
        except _RefusedError as refusal:
            advice = f"; {refusal.advice}" if refusal.advice else ""
            problems.append(f"{where(key)} must {refusal.rule}, got {show(value)}{advice}")
    problems += [f"{where(key)} must be given; it has no default" for key in missing(cls, table, hidden)]
    return values


def missing(cls: type[Any], given: Iterable[str], hidden: Iterable[str] = ()) -> list[str]:
    """Fields without a default that are neither given nor hidden."""
    absent = [field for field in dataclasses.fields(cls) if field.name not in {*given, *hidden}]
    return [f.name for f in absent if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]


def build(
    cls: type[T],
    table: Mapping[str, object],
    where: Callable[[str], str],
    problems: list[str],
    *,
    rules: Mapping[str, Rule] = types.MappingProxyType({}),
    hidden: Iterable[str] = (),
) -> T | None:
    """The dataclass of a table, or ``None`` when something was wrong with it; see `read`.

    A class that checks itself does so with ``ValueError``, several sentences joined by ``"; "``, each opening with its
    field; they are passed on with their places. One that opens otherwise, a hint, belongs to the one before.
    """
    before = len(problems)
    values = read(cls, table, where, problems, rules=rules, hidden=hidden)
    if not missing(cls, values, hidden):
        try:  # with defaults for what could not be read, so that its own rules are heard at the same time
            built = cls(**values)
        except ValueError as error:
            fields = "|".join(re.escape(field.name) for field in dataclasses.fields(cls))  # type: ignore[arg-type]
            problems += [where(sentence) for sentence in re.split(rf"; (?=(?:{fields})\b)", str(error))]
        else:
            return built if len(problems) == before else None
    return None
