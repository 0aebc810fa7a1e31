"""Configs from TOML files and --set: parsed, checked as a whole, and written back."""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Callable
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import ForgeError, counted
from trainer.config import Config, ModelConfig

T = TypeVar("T", Config, ModelConfig)
SECTIONS = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}

# Keys that earlier versions had, with their defaults: ignored at these, refused at other values.
REMOVED = {
    "batch.doublings": 0,
    "batch.doubling_steps": 100,
    "schedule.count_downtime": False,
    "checkpoint.keep_every_hours": 6.0,
    "optimizer.muon_normalize": True,
    "guard.spike_zscore": None,
    "guard.spike_window_steps": 128,
}
EDIT = "edit the file, or --set section.key=value"


def flat(config: Config) -> dict[str, Any]:
    """The values by section.key, without absent ones, as JSON and TOML have them."""
    found: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        section = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {}
        found |= section or {name: value}
    return {k: list(v) if type(v) is tuple else v for k, v in found.items() if v is not None}


def to_toml(config: Config) -> str:
    """The resolved config as a TOML file that load() reads back to an equal Config."""
    # JSON writes these values as TOML does.
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in flat(config).items())


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys of two flat() configs that differ, one per line; REMOVED ones have their default."""
    before, after = REMOVED | before, REMOVED | after
    return [
        f"{key}: {before.get(key, 'none')} -> {after.get(key, 'none')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def available() -> list[str]:
    """Names of the configs that come with the program."""
    names = [file.name for file in files("configs").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load(
    name: str,
    settings: tuple[str, ...] = (),
    find_model: Callable[[], ModelConfig] | None = None,
) -> Config:
    """Config by name (from configs/, whatever the working directory) or by path.

    `settings` are `section.key=value` strings, the value in TOML's notation, quotes optional.
    `find_model` gives the model where the file has none, as chat.toml. Raises ForgeError that lists
    every problem.
    """
    is_path = name.endswith(".toml") or "/" in name
    path: Any = Path(name) if is_path else files("configs") / f"{name}.toml"
    if not path.is_file():
        known = available()
        close = [f"did you mean {each}? " for each in difflib.get_close_matches(name, known, 1)]
        fix = f"{''.join(close)}give the path of a .toml file, or one of: {', '.join(known)}"
        raise ForgeError(f"no such config{' file' * is_path}", where=name, fix=fix)
    values = read_toml(path)
    if "model" not in values and find_model:
        model = dataclasses.asdict(find_model())
        values["model"] = {key: value for key, value in model.items() if value is not None}
    for setting in settings:
        apply_setting(values, setting)
    drop_removed(values, path, name)
    return checked(Config, {section: {} for section in SECTIONS} | values, "", name, EDIT)


def model_from_dict(values: dict[str, Any], where: object, fix: str = EDIT) -> ModelConfig:
    """Build and check a ModelConfig; ForgeError that lists every problem."""
    return checked(ModelConfig, values, "model.", where, fix)


def checked(kind: type[T], values: dict[str, Any], prefix: str, where: object, fix: str) -> T:
    """A `kind` of `values`, under the names `prefix`; ForgeError that lists every problem."""
    problems: list[str]
    try:
        built = TypeAdapter(kind).validate_python(values)
        problems = built.conflicts()
    except ValidationError as error:
        by_key = groupby(error.errors(), lambda each: prefix + ".".join(map(str, each["loc"][:2])))
        problems = [explained(key, list(errors)) for key, errors in by_key]
    if problems:
        first = f"the config has {counted(len(problems), 'problem')}:"
        raise ForgeError("\n    ".join([first, *problems]), where=where, fix=fix)
    return built


def explained(key: str, errors: list[ErrorDetails]) -> str:
    """What is wrong with a key; several errors are of values that may have one of several types."""
    kind, value = errors[0]["type"], errors[0]["input"]
    if kind == "missing":
        is_of_a_list = isinstance(errors[0]["loc"][-1], int)
        return f"{key} has too few values" if is_of_a_list else f"{key} is missing"
    if kind == "unexpected_keyword_argument":
        close = similar(key)
        return f"{key} does not exist" + (f"; did you mean {close[0]}?" if close else "")
    wanted = " or ".join(re.sub("^(Input|Tuple) should ", "", each["msg"]) for each in errors)
    return f"{key} must {wanted}, not {value!r}"


def similar(key: str) -> list[str]:
    """Keys with the same last part, or else the one that is most alike, if any is."""
    known = [*SECTIONS, *(field.name for field in dataclasses.fields(Config))]
    known += [f"{s}.{f.name}" for s, of in SECTIONS.items() for f in dataclasses.fields(of)]
    elsewhere = [name for name in known if name.endswith(f".{key.split('.')[-1]}")]
    return elsewhere or difflib.get_close_matches(key, known, 1)


def read_toml(path: Any) -> dict[str, Any]:
    """The tables of a TOML file; ForgeError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        fix = "correct it, or give the name of a config"
        raise ForgeError(f"cannot read the config: {error}", where=path, fix=fix) from error


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Put the value of a `section.key=value` into the tables `values`."""
    key, equals, text = setting.partition("=")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {"value": text}  # a bare word is a string
    if not equals or len(parsed) > 1 or isinstance(parsed["value"], dict):
        fix = "give each key a --set of its own, such as --set optimizer.peak_lr=3e-4"
        what = "--set takes one value, as section.key=value"
        raise ForgeError(what, where=f"--set {setting}", fix=fix)
    *sections, last = key.strip().split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = parsed["value"]


def drop_removed(values: dict[str, Any], path: Any, name: str) -> None:
    """Drop REMOVED keys from `values`; ForgeError with the line of one that has another value."""
    for removed, default in REMOVED.items():
        section, key = removed.split(".")
        table = values.get(section)
        value = table.pop(key, default) if isinstance(table, dict) else default
        if value != default:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            is_here = re.compile(rf"\s*({section}\.)?{key}\s*=").match
            found = [f", line {number}" for number, line in enumerate(lines, 1) if is_here(line)]
            what = f"{removed} = {json.dumps(value, default=str)}: this feature was removed"
            raise ForgeError(what, where="".join([name, *found]), fix="delete it, or its --set")
