"""Settings: frozen, keyword-only dataclasses, nested; resolved from a recipe, a TOML file and overrides.

A setting has a dotted key, ``train.steps``. Two more keys are Python keywords, so no field has their name:

* ``None = ["train.clip", ...]`` at the top of a TOML file lists the keys that are None: TOML has no null.
  On the command line that is ``--train.clip None``.
* ``class = "AdamW.Config"`` in a table, or ``--optimizer.class AdamW.Config``, says which dataclass fills
  a field that may hold one of several, or none. It starts from the defaults of that class, unless the
  field holds one of that class already.

This module knows no concrete settings.
"""

import contextlib
import dataclasses
import difflib
import io
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from flashtrain.errors import UserError

T = TypeVar("T")


def resolve(base: T, file: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """``base`` changed by a TOML file, then by words ``--dotted.key VALUE`` or ``--dotted.key=VALUE``.

    A tuple takes several words, or one with commas. The result is built once, after all changes, so a
    ``__post_init__`` that checks settings against each other sees the final ones. Raises UserError, in
    one line, for an unknown key (naming the nearest), a bad value (naming the expected type) and a
    ValueError of a ``__post_init__``.
    """
    draft = _Draft.of(base)
    if file is not None:
        draft.merge(_read(file), f"{file}: ")
    for key, words in _pairs(overrides):
        _override(draft, key, words)
    return draft.build()


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """The settings that ``to_dict`` made ``data`` from; what ``data`` leaves out takes its default."""
    draft = _Draft(cls)
    draft.merge(data, "")
    return draft.build()


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data: paths are strings, tuples lists, enums names, and None stays None."""
    hints = _fields(type(config))
    return {name: _plain(getattr(config, name), hint) for name, hint in hints.items()}


def save(config: Any, path: Path) -> None:
    """Write ``config`` as TOML; ``resolve(any config of this type, path)`` gives back an equal object.

    Raises TypeError, before it writes, if a value does not survive the way through TOML.
    """
    import tomli_w

    nones: list[str] = []
    data = _without_none(to_dict(config), "", nones)
    text = tomli_w.dumps({"None": nones, **data} if nones else data)
    # NaN differs from itself, so representations are compared, and not objects.
    if repr(again := from_dict(type(config), _with_none(tomllib.loads(text)))) != repr(config):
        raise TypeError(f"these settings do not survive TOML: {config!r} comes back as {again!r}")
    path.write_text(text, encoding="utf-8")


def keys(config: Any) -> list[str]:
    """All dotted keys that a file or the command line may set, in the order of the fields."""
    return list(_Draft.of(config).keys())


def _fields(cls: type) -> dict[str, Any]:
    """Names and resolved types of the fields that the constructor takes."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _takes_none(hint: Any) -> bool:
    return type(None) in _members(hint)


def _declared(hint: Any) -> list[type]:
    """The dataclasses that a field's type names."""
    return [
        member for member in _members(hint) if isinstance(member, type) and dataclasses.is_dataclass(member)
    ]


def _candidates(hint: Any) -> list[type]:
    """The dataclasses that a field may hold: those its type names, and their subclasses."""
    found = _declared(hint)
    for cls in found:  # grows while it is walked, so that subclasses of subclasses are found too
        subclasses: list[type] = cls.__subclasses__()
        found.extend(sub for sub in subclasses if sub not in found)
    return found


def _choosable(hint: Any) -> bool:
    return bool(_declared(hint)) and (_takes_none(hint) or len(_candidates(hint)) > 1)


class _Mismatch(Exception):
    """A value does not fit its type."""


@dataclasses.dataclass
class _Draft:
    """A dataclass under construction, its sections too, so that nothing is checked half-made."""

    cls: type
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self.cls):
            if not field.init or field.name in self.values:
                continue
            if field.default is not dataclasses.MISSING:
                self.values[field.name] = _Draft.of(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                self.values[field.name] = _Draft.of(field.default_factory())

    @staticmethod
    def of(value: Any) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        return _Draft(type(value), {name: _Draft.of(getattr(value, name)) for name in _fields(type(value))})

    def keys(self, prefix: str = "") -> Iterator[str]:
        for name, hint in _fields(self.cls).items():
            value = self.values.get(name)
            if _choosable(hint):
                yield f"{prefix}{name}.class"
            if isinstance(value, _Draft):
                yield from value.keys(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    def merge(
        self, table: Mapping[str, Any], where: str, prefix: str = "", root: "_Draft | None" = None
    ) -> None:
        """Take over plain data. ``where`` opens messages; ``prefix`` is this section's key and a dot."""
        for name, value in table.items():
            key = prefix + name
            if name == "class" and prefix:
                continue
            if name not in _fields(self.cls):
                _unknown(f"{where}unknown key ", key, root.keys() if root else self.keys(prefix))
            hint = _fields(self.cls)[name]
            if isinstance(value, Mapping) and _declared(hint):
                section = _section(hint, self.values.get(name), value.get("class"), f"{where}{key}")
                section.merge(value, where, f"{key}.", root or self)
                self.values[name] = section
                continue
            try:
                self.values[name] = _convert(value, hint, where, key)
            except _Mismatch:
                raise UserError(f"{where}{key} = {value!r}: expected {_describe(hint)}") from None

    def build(self, where: str = "") -> Any:
        built = {
            name: value.build(f"{where}.{name}" if where else name) if isinstance(value, _Draft) else value
            for name, value in self.values.items()
        }
        named = f"{where}: " if where else ""
        if missing := [name for name in _fields(self.cls) if name not in built]:
            raise UserError(f"{named}{self.cls.__qualname__} needs a value for {', '.join(missing)}")
        try:
            return self.cls(**built)
        except ValueError as error:
            raise UserError(f"{named}{error}") from None


def _section(hint: Any, current: Any, choice: Any, where: str) -> _Draft:
    """The draft that a table for a field of type ``hint`` goes to; ``choice`` is its class key, if any."""
    if choice is None:
        if isinstance(current, _Draft):
            return current
        if len(_declared(hint)) == 1:
            return _Draft(_declared(hint)[0])
        raise UserError(f"{where}: choose a class first: {_describe(hint)}")
    names = {cls.__qualname__: cls for cls in _candidates(hint)}
    if choice not in names:
        _unknown(f"{where}: unknown class ", str(choice), names)
    return current if isinstance(current, _Draft) and current.cls is names[choice] else _Draft(names[choice])


def _convert(value: Any, hint: Any, where: str, key: str) -> Any:
    """Plain data as a value of type ``hint``; raises _Mismatch if it is none. ``where`` opens messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if len(_members(hint)) > 1:
        # An exact type goes first: 1 stays an int in ``float | int``, "x" a string in ``Path | str``.
        for member in sorted(_members(hint), key=lambda member: type(value) is not member):
            with contextlib.suppress(_Mismatch):
                return _convert(value, member, where, key)
        raise _Mismatch
    if _declared(hint) and isinstance(value, Mapping):
        section = _section(hint, None, value.get("class"), f"{where}{key}")
        section.merge(value, where, f"{key}.")
        return section.build(f"{where}{key}")
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
        raise _Mismatch
    kind = origin or hint
    if kind in (tuple, list) and isinstance(value, list | tuple):
        if not arguments:
            return kind(value)
        element = [arguments[0]] * len(value) if kind is list or arguments[1:] == (...,) else arguments
        if len(element) != len(value):
            raise _Mismatch
        return kind(
            _convert(v, h, where, f"{key}.{i}") for i, (v, h) in enumerate(zip(value, element, strict=True))
        )
    if isinstance(kind, type) and issubclass(kind, Mapping) and isinstance(value, Mapping):
        return {
            k: _convert(v, arguments[1] if arguments else Any, where, f"{key}.{k}") for k, v in value.items()
        }
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(kind, type) and issubclass(kind, Enum) and value in kind.__members__:
        return kind[value]
    if (
        isinstance(kind, type)
        and isinstance(value, kind)
        and not (kind in (int, float) and type(value) is bool)
    ):
        return value
    raise _Mismatch


def _plain(value: Any, hint: Any = Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag: dict[str, Any] = {}
        if type(value) not in (candidates := _candidates(hint)):
            raise TypeError(f"{type(value).__qualname__} is none of the classes that its field declares")
        if len(candidates) > 1:
            tag["class"] = type(value).__qualname__
        return tag | to_dict(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        options = [member for member in _members(hint) if typing.get_origin(member) in (tuple, list)]
        arguments = typing.get_args(options[0]) if options else (Any, ...)
        one = len(arguments) == 1 or arguments[1:] == (...,)
        return [_plain(element, arguments[0 if one else i]) for i, element in enumerate(value)]
    return value


def _without_none(data: Any, key: str, nones: list[str]) -> Any:
    """``data`` without its None values, whose keys go to ``nones``; an element's key is its index."""
    if not isinstance(data, dict | list):
        return data
    kept = []
    for name, value in data.items() if isinstance(data, dict) else enumerate(data):
        path = f"{key}.{name}" if key else str(name)
        if value is None:
            nones.append(path)
        else:
            kept.append((name, _without_none(value, path, nones)))
    return dict(kept) if isinstance(data, dict) else [value for _, value in kept]


def _with_none(data: dict[str, Any]) -> dict[str, Any]:
    """Undo ``_without_none``: put a None wherever the ``None`` list says."""
    for path in data.pop("None", []):
        *parents, last = path.split(".")
        container: Any = data
        for part in parents:
            container = (
                container[int(part)] if isinstance(container, list) else container.setdefault(part, {})
            )
        if isinstance(container, list):
            container.insert(int(last), None)
        else:
            container[last] = None
    return data


def _read(file: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from None
    nones = data.get("None", [])
    try:
        return _with_none(data)
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UserError(f"{file}: None = {nones!r}: expected a list of keys of this file") from None


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Keys with the words that follow them. A word that starts with two dashes needs the form with ``=``."""
    words = list(overrides)
    while words:
        option = words.pop(0)
        if not option.startswith("--") or option == "--":
            raise UserError(f"unexpected argument {option}: settings are written --dotted.key VALUE")
        key, equals, value = option[2:].partition("=")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        yield key, values


def _override(root: _Draft, key: str, words: list[str]) -> None:
    """Set one key from the words of the command line."""
    *parents, last = key.split(".")
    draft: Any = root
    if last == "class" and parents:
        *parents, last = parents
    for part in parents:
        draft = draft.values.get(part) if isinstance(draft, _Draft) else None
    hint = _fields(draft.cls).get(last) if isinstance(draft, _Draft) else None
    if hint is None or (key.endswith(".class") and not _choosable(hint)):
        _unknown("unknown key --", key, root.keys(), "--")
    if key.endswith(".class"):
        if len(words) != 1:
            raise UserError(f"--{key} needs a value: {_describe(hint)}")
        draft.values[last] = _section(hint, draft.values.get(last), words[0], f"--{key}")
        return
    if _declared(hint) and _takes_none(hint) and words == ["None"]:
        draft.values[last] = None
        return
    if _declared(hint):
        such = [name for name in root.keys() if name.startswith(f"{key}.")][:1]  # noqa: SIM118
        raise UserError(
            f"--{key} is a section: set one of its keys, such as --{(such or [key + '.class'])[0]}"
        )
    if not words:
        raise UserError(f"--{key} needs a value: {_describe(hint)}")
    try:
        draft.values[last] = _parse(hint, words)
    except _Mismatch:
        raise UserError(f"--{key} {' '.join(words)}: expected {_describe(hint)}") from None


def _parse(hint: Any, words: list[str]) -> Any:
    """Words of the command line as a value of type ``hint``, by tyro; raises _Mismatch if they are none."""
    import tyro

    containers = [
        m for m in _members(hint) if typing.get_origin(m) in (tuple, list, dict) or m in (tuple, list, dict)
    ]
    if any(dataclasses.is_dataclass(part) for container in containers for part in typing.get_args(container)):
        raise _Mismatch
    if containers and words != ["None"] and len(words) == 1:
        words = [word for word in words[0].split(",") if word]
    if any(bool in (member, *typing.get_args(member)) for member in _members(hint)):
        words = [word.capitalize() if word.lower() in ("true", "false") else word for word in words]
    holder: Any = dataclasses.make_dataclass("holder", [("value", hint)])
    single = not containers and len(words) == 1
    arguments = [f"--value={words[0]}"] if single else ["--value", *words]
    # tyro answers a bad value with a box of several lines and an exit.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            flags_take_values: Any = tyro.conf.FlagConversionOff
            kind = flags_take_values[holder]
            return tyro.cli(kind, args=arguments, add_help=False, console_outputs=False).value
        except SystemExit:
            raise _Mismatch from None


def _describe(hint: Any) -> str:
    """A type in words for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(_members(hint)) > 1 or _declared(hint):
        options = [cls.__qualname__ for cls in _candidates(hint)]
        options += [_describe(member) for member in _members(hint) if member not in _declared(hint)]
        return " or ".join(options)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (tuple, list) and arguments:
        if origin is list or arguments[1:] == (...,):
            return f"a list of {_describe(arguments[0])}"
        return f"{len(arguments)} values ({', '.join(_describe(argument) for argument in arguments)})"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    named: dict[Any, str] = {
        bool: "true or false",
        type(None): "None",
        Path: "a path",
        str: "text",
        Any: "anything",
    }
    return named.get(hint) or str(getattr(hint, "__name__", hint))


def nearest(word: str, options: Iterator[str] | Sequence[str] | Mapping[str, Any]) -> str | None:
    """The option that a person most likely meant by ``word``; dotted keys also match by their last part."""

    def likeness(option: str) -> float:
        whole = difflib.SequenceMatcher(None, word, option).ratio()
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], option.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last) + 0.01 * whole

    return max(options, key=likeness, default=None)


def _unknown(start: str, key: str, options: Any, mark: str = "") -> NoReturn:
    hint = nearest(key, options)
    raise UserError(f"{start}{key}" + (f"; the nearest is {mark}{hint}" if hint else ""))
