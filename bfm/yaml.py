"""Strict YAML: a file in, a plain dict out, or one line that names file and line.

Scalars follow YAML 1.2's core schema: `1e17` is a number, `no` and `on` are text, dates stay text, `010` is ten.
Duplicate keys, aliases that blow up, deep nesting, oversized and non-UTF-8 files are refused. `validate` turns a dict
into a pydantic model with the same one-line errors.

No other library makes this shorter: ruamel.yaml reads dates as dates and `1_000` as a number, yamlcore (YAML 1.2 for
PyYAML) knows no merge keys, and both leave to their user what most of this is: the checks of keys, aliases and depth,
and errors of one line. What they would spare is the table of scalars.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from bfm.errors import UserError

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
Model = TypeVar("Model")
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_KINDS = {"tuple_type": "list", "list_type": "list", "dict_type": "mapping", "model_type": "mapping"}
_KINDS |= {"dataclass_type": "mapping"}
"""What pydantic calls by names of its own."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As SafeLoader, but keys are text and stand once."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key must be text", key_node)
            if key_node.value in seen:
                raise _problem(f"duplicate key {key_node.value!r}", key_node)
            if key_node.tag != "tag:yaml.org,2002:str":
                raise _problem(f"key {key_node.value!r} is not text; quote it", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # SafeLoader reads 010 as octal and 1:30 as sexagesimal; neither is YAML 1.2.
    return int(loader.construct_scalar(node))


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _float)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping. Raises UserError (file, line, what, fix) for anything else."""
    file = str(path)
    try:
        data = Path(path).read_bytes() if Path(path).stat().st_size <= MAX_BYTES else None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=file, fix="check the path") from error
    if data is None:
        raise UserError(f"larger than {MAX_BYTES} bytes", file=file, fix="this is not a settings file")
    try:
        return parse_yaml(data.decode("utf-8-sig"), file=file)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", file=file, fix="save the file as UTF-8") from error


def parse_yaml(text: str, *, file: str) -> dict[str, Any]:
    """As `load_yaml`, from text; `file` is named in errors."""
    try:
        loader = _StrictLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise UserError("is empty", file=file, fix="write at least the required keys")
            if not isinstance(node, yaml.MappingNode):
                raise UserError("the top level is not a mapping", file=file, fix="write `key: value` lines")
            _check_expansion(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else file
        raise UserError(_one_line(error.problem or "not valid YAML"), file=place, fix="correct the YAML") from error
    except yaml.YAMLError as error:
        raise UserError(_one_line(str(error)), file=file, fix="correct the YAML") from error
    except RecursionError as error:
        raise UserError("nested too deeply", file=file, fix="write fewer levels") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_one_line(str(error)), file=file, fix="correct the YAML") from error


def validate(
    model: type[Model], values: Mapping[str, Any], *, file: str | None = None, words: Mapping[str, str] | None = None
) -> Model:
    """Build a pydantic model or dataclass (extra="forbid"), or raise the first fault as one UserError.

    `words`: keys and choices that people bring from elsewhere -> what to write.
    """
    try:
        return TypeAdapter(model).validate_python(dict(values))
    except ValidationError as error:
        # An unknown key is the likelier slip than the required key that it leaves missing.
        fault = sorted(error.errors(), key=lambda item: item["type"] not in _UNKNOWN)[0]
        raise _user_error(model, fault, file, words or {}) from error


def did_you_mean(word: str, known: Iterable[str], words: Mapping[str, str] | None = None) -> str:
    """A fix: what `words` say of the word, else the nearest known one, else all of them."""
    if words and word.lower() in words:
        return words[word.lower()]
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def _user_error(model: type, fault: Any, file: str | None, words: Mapping[str, str]) -> UserError:
    inner = fault.get("ctx", {}).get("error")
    location = [part for part in fault["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join(str(part) for part in location) or None
    if isinstance(inner, UserError):
        nested = ".".join(part for part in (key, inner.key) if part) or None
        return UserError(inner.what, file=file, key=nested, fix=inner.fix)
    if fault["type"] in _UNKNOWN:
        fix = did_you_mean(str(location[-1]), _keys_at(model, location[:-1]), words)
        return UserError("unknown key", file=file, key=key, fix=fix)
    if fault["type"] in ("missing", "missing_argument"):
        return UserError("is missing", file=file, key=key, fix="add it")
    if fault["type"] == "literal_error":
        known = [choice.strip("'") for choice in re.split(", | or ", fault["ctx"]["expected"])]
        fix = did_you_mean(str(fault["input"]), known, words)
        return UserError(f"{fault['input']!r:.60} is no choice", file=file, key=key, fix=fix)
    kind = _KINDS.get(fault["type"])
    what = f"expected a {kind}" if kind else _one_line(fault["msg"])
    return UserError(what, file=file, key=key, fix=f"got {fault['input']!r:.60}")


def _keys_at(model: type, location: list[Any]) -> list[str]:
    """Field names (aliases) of the model that the location leads to; the root's where it cannot be followed."""
    current = model
    for part in location:
        field = _fields(current).get(str(part))
        nested = _model_in(field.annotation) if field else _model_in(current)
        if nested is not None:
            current = nested
    return [field.alias or name for name, field in _fields(current).items()]


def _fields(model: Any) -> dict[str, Any]:
    return getattr(model, "__pydantic_fields__", {})


def _model_in(annotation: Any) -> type | None:
    if isinstance(annotation, type) and _fields(annotation):
        return annotation
    found = (_model_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)


def _check_expansion(root: yaml.Node) -> None:
    """Refuse documents whose aliases, written out, would exceed MAX_NODES nodes, and recursive aliases."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise _problem("an alias contains itself", node)
        if known:
            return known
        sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.MappingNode):
            total += sum(size(key) + size(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(child) for child in node.value)
        if total > MAX_NODES:
            raise _problem(f"aliases expand to more than {MAX_NODES} values", node)
        sizes[id(node)] = total
        return total

    size(root)


def _problem(what: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _one_line(text: str) -> str:
    return " ".join(text.split())
