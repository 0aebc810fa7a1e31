"""Configs from configs/*.toml, with --set on top: parsed, checked, and written back.

Absent keys mean their defaults, unknown keys are refused, and all problems are reported together.
"""

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pipeline.errors import ForgeError
from trainer.config import Config, ModelConfig

T = TypeVar("T")

# Keys that earlier versions had, with their defaults: ignored at these, refused at other values.
REMOVED = {
    "batch.doublings": 0,
    "batch.doubling_steps": 100,
    "schedule.count_downtime": False,
    "guard.spike_zscore": None,
    "guard.spike_window_steps": 128,
}


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def to_toml(config: Config) -> str:
    """The resolved config as a TOML file that load() reads back to an equal Config."""
    values = config.to_dict()
    lines = [f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for section, keys in values.items():
        if isinstance(keys, dict):
            lines += ["", f"[{section}]", *(f"{k} = {_toml(v)}" for k, v in keys.items())]
    return "\n".join(lines) + "\n"


def differences(before: Config, after: Config) -> list[str]:
    """The keys that differ, one per line."""
    flat = []
    for values in (before.to_dict(), after.to_dict()):
        parts = {k: v if isinstance(v, dict) else {"": v} for k, v in values.items()}
        flat.append(
            {f"{s}.{k}".strip("."): v for s, keys in parts.items() for k, v in keys.items()}
        )
    old, new = flat
    return [
        f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def available() -> list[str]:
    """Names of the configs that come with the program, smallest model first."""
    named = [f for f in files("configs").iterdir() if f.name.endswith(".toml")]
    tables = {f.name[:-5]: tomllib.loads(f.read_text(encoding="utf-8"))["model"] for f in named}
    return sorted(tables, key=lambda n: tables[n]["num_layers"] * tables[n]["embedding_size"] ** 2)


def load(name: str, settings: tuple[str, ...] = ()) -> Config:
    """Config by name (from configs/, whatever the working directory) or by path.

    `settings` are `section.key=value` strings, the value in TOML's notation, quotes optional.
    Raises ForgeError that lists every problem.
    """
    if name.endswith(".toml") or "/" in name:
        path: Any = Path(name)
        if not path.is_file():
            raise ForgeError(
                "no such config file", where=name, fix=f"or name one of: {', '.join(available())}"
            )
    else:
        path = files("configs") / f"{name}.toml"
        if not path.is_file():
            known = ", ".join(available())
            close = difflib.get_close_matches(name, available(), 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ForgeError(
                "no such config", where=name, fix=f"{hint}there are: {known}; or give a .toml path"
            )
    values = read_toml(path)
    for setting in settings:
        _apply(values, setting)
    return _without_removed(values, path, name)


def read_toml(path: Any) -> dict[str, Any]:
    """The tables of a TOML file; ForgeError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ForgeError(
            f"cannot read the config: {error}",
            where=path,
            fix="correct it, or give the name of a config",
        ) from error


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise ForgeError(
            "--set takes key=value", where=setting, fix="such as --set optimizer.peak_lr=3e-4"
        )
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {"value": text}  # a bare word is a string
    value = parsed.pop("value")
    if parsed or isinstance(value, dict):
        raise ForgeError(
            "--set takes one value",
            where=f"--set {setting}",
            fix="give each key a --set of its own: section.key=value",
        )
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ForgeError(
                f"{section} is no section", where=f"--set {setting}", fix="write section.key=value"
            )
    values[last] = value


def _without_removed(values: dict[str, Any], path: Any, name: str) -> Config:
    """from_dict() without REMOVED keys; ForgeError that gives the line of one that is in use."""
    for removed, default in REMOVED.items():
        section, key = removed.split(".")
        table = values.get(section)
        if isinstance(table, dict) and key in table and (value := table.pop(key)) != default:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            found = [n for n, line in enumerate(lines, 1) if re.match(rf"\s*{key}\s*=", line)]
            raise ForgeError(
                f"{removed} = {_toml(value)} asks for something that was removed",
                where=f"{name}, line {found[0]}" if found else f"--set {removed}",
                fix="delete it",
            )
    return from_dict(values, name)


def from_dict(values: dict[str, Any], where: str) -> Config:
    """Build and check a Config; ForgeError lists every problem at once."""
    problems: list[str] = []
    config: Config = _build(Config, values, "", problems)
    return _checked(config, problems or _check(config), where)


def model_from_dict(values: dict[str, Any], where: object) -> ModelConfig:
    """Build and check a ModelConfig; ForgeError lists every problem at once."""
    problems: list[str] = []
    model: ModelConfig = _build(ModelConfig, values, "model.", problems)
    return _checked(model, problems or _check_family(model), where)


def _checked(built: T, problems: list[str], where: object) -> T:
    if problems:
        raise ForgeError(
            f"the config has {len(problems)} problem{'s' * (len(problems) > 1)}:\n    "
            + "\n    ".join(problems),
            where=where,
            fix="edit the file, or --set section.key=value",
        )
    return built


def names_in(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _build(cls: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            close = [prefix + name for name in difflib.get_close_matches(key, fields, 1)]
            close += [f"{section}.{key}" for section in fields if key in names_in(hints[section])]
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            problems.append(f"{prefix}{key} does not exist; {hint}")
    built = {}
    for key, each in fields.items():
        kind, name = hints[key], prefix + key
        required = each.default is dataclasses.MISSING and (
            each.default_factory is dataclasses.MISSING
        )
        if key not in values:
            if required and not dataclasses.is_dataclass(kind):
                problems.append(f"{name} is missing")
            elif required:
                _build(kind, {}, f"{name}.", problems)
        elif dataclasses.is_dataclass(kind):
            if isinstance(values[key], dict):
                built[key] = _build(kind, values[key], f"{name}.", problems)
            else:
                problems.append(f"{name} must be a table [{name}], not {values[key]!r}")
        else:
            try:
                built[key] = _convert(values[key], kind)
            except TypeError as error:
                problems.append(f"{name} must be {error}, not {values[key]!r}")
    return None if problems else cls(**built)


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`; TypeError that describes the kind when it is none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        converted = _convert(value, args[0])
        args[1].check(converted)
        return converted
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        raise TypeError(" or ".join(f'"{arg}"' for arg in args))
    if origin in (types.UnionType, typing.Union):
        wanted = []
        for arg in args:
            if arg is not type(None):
                try:
                    return _convert(value, arg)
                except TypeError as error:
                    wanted.append(str(error))
        raise TypeError(" or ".join(wanted))
    if origin is tuple:
        if isinstance(value, list) and len(value) == len(args):
            return tuple(_convert(v, arg) for v, arg in zip(value, args, strict=True))
        raise TypeError(f"a list of {len(args)} numbers")
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise TypeError({bool: "true or false", int: "a whole number", float: "a number"}[kind])


def _check(config: Config) -> list[str]:
    """What does not fit together."""
    model, batch, schedule = config.model, config.batch, config.schedule
    problems = _check_family(model)
    for name, tokens in (
        ("batch.tokens_per_step", batch.tokens_per_step),
        ("evaluate.num_tokens", config.evaluate.num_tokens),
    ):
        if tokens % model.context_length:
            problems.append(
                f"{name} ({tokens}) must be a multiple of model.context_length "
                f"({model.context_length})"
            )
    if config.num_steps() is None and schedule.budget_hours is None:
        problems.append(
            "schedule.max_steps, schedule.max_tokens or schedule.budget_hours must say when to end"
        )
    if schedule.budget_hours is not None and config.shape() == "cosine":
        problems.append('schedule.shape = "cosine" cannot follow the clock: leave out budget_hours')
    return problems


def _check_family(model: ModelConfig) -> list[str]:
    """What does not fit the family of the model."""
    problems = []
    if model.head_size is None and model.embedding_size % model.num_heads:
        problems.append(
            f"model.embedding_size ({model.embedding_size}) must be a multiple of model.num_heads "
            f"({model.num_heads})"
        )
    if model.family == "gpt2":
        for name in ("num_kv_heads", "head_size", "mlp_size", "rope_theta"):
            if getattr(model, name) != getattr(ModelConfig, name):
                problems.append(f'model.{name} is only for model.family = "qwen3"')
        return problems
    if model.bias:
        problems.append('model.bias must be false: model.family = "qwen3" has no biases')
    if model.num_heads % model.kv_heads():
        problems.append(
            f"model.num_heads ({model.num_heads}) must be a multiple of model.num_kv_heads "
            f"({model.num_kv_heads})"
        )
    if model.head_dim() % 2:
        problems.append(f"a head's size must be even to be rotated, not {model.head_dim()}")
    return problems
