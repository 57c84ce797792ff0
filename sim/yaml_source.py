"""YAML as a newcomer expects it, with the line of every key.

PyYAML follows YAML 1.1, where `1e-6` is a string, `on` is true, `12:30` is 750, the second of two equal keys
silently wins, and a few lines of aliases can fill the memory. Here scalars are those of YAML 1.2's core
schema (plus `4_194_304`), and duplicate keys, aliases and tags are errors.
Source: YAML 1.2.2, section 10.3.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from sim.errors import ConfigError, Problem

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars instead of YAML 1.1's."""


_Loader.yaml_implicit_resolvers = {}

for _name, _pattern in (
    ("null", r"~|null|"),
    ("bool", r"true|false"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)

_SCALAR: dict[str, Callable[[str], object]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: text == "true",
    _TAG + "int": int,
    _TAG + "float": float,
    _TAG + "str": str,
}


class Source(NamedTuple):
    """Plain data and the place each key of it came from."""

    data: Any
    where: dict[str, str]  # "nic.rate" -> "tp4.yaml:12"; "" -> the place of the whole


def read_yaml(text: bytes | str, locate: Callable[[int], str]) -> Source:
    """Parse one document. `locate` makes a place out of a 1-based line number.

    Raises: ConfigError, also for what YAML allows and a scenario does not (see above).
    """
    where: dict[str, str] = {"": locate(1)}
    try:
        root = yaml.compose(text, Loader=_Loader)
        return Source(None if root is None else _plain(root, "", where, set(), locate), where)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(Problem(locate(line), "", f"expected YAML; its parser says: {error.problem}")) from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(Problem(locate(1), "", f"expected YAML; its parser says: {reason}")) from None


def _plain(node: yaml.Node, key: str, where: dict[str, str], seen: set[int], locate: Callable[[int], str]) -> object:
    """Return the node as dicts, lists and scalars; note the place of each key on the way."""

    def refuse(expected: str, what: str, key: str = key, node: yaml.Node = node) -> ConfigError:
        place = locate(node.start_mark.line + 1)
        return ConfigError(Problem(place, key, f"expected {expected}, came {what}"))

    if id(node) in seen:
        raise ConfigError(Problem(where[key], key, "expected a value written out, came a YAML alias"))
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, object] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise refuse("a plain key", "a list or mapping", node=name)
            path = f"{key}.{name.value}".lstrip(".")
            if name.value in mapping:
                raise refuse("each key once", f"{name.value!r} a second time", key=path, node=name)
            where[path] = locate(name.start_mark.line + 1)
            mapping[name.value] = _plain(value, path, where, seen, locate)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            where[f"{key}.{index}"] = locate(item.start_mark.line + 1)
        return [_plain(item, f"{key}.{index}", where, seen, locate) for index, item in enumerate(node.value)]
    try:
        return _SCALAR[node.tag](node.value)
    except (KeyError, ValueError):  # a tag of the user's, or a number beyond Python's limit of digits
        raise refuse("a plain value", f"{node.value[:40]!r} as {node.tag.replace(_TAG, '!!')}") from None
