"""Reads `fleet.yaml`; a mistake is answered with file, line, field and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from tandem.config import FleetConfig


class ConfigError(ValueError):
    """The file cannot be used; the message names every mistake, one a line."""


def load_config(path: Path) -> FleetConfig:
    """The fleet described by a YAML file. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: byte {error.start} cannot be read") from error
    return _found_from(path.absolute().parent, parse_config(text, str(path)))


def _found_from(folder: Path, config: FleetConfig) -> FleetConfig:
    """The same, its certificates being where they are seen from `folder`: the gateway's process may run elsewhere."""
    found: dict[str, BaseModel] = {}
    if (tls := config.gateway.tls) is not None:
        files = {"certificate": folder / tls.certificate, "key": folder / tls.key}
        if tls.client_ca is not None:
            files["client_ca"] = folder / tls.client_ca
        found["gateway"] = config.gateway.model_copy(update={"tls": tls.model_copy(update=files)})
    if config.oidc is not None and config.oidc.ca is not None:
        found["oidc"] = config.oidc.model_copy(update={"ca": folder / config.oidc.ca})
    return config.model_copy(update=found)


def parse_config(text: str, source: str) -> FleetConfig:
    """The fleet described by YAML `text`; `source` names it in errors. Raises `ConfigError`."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    if twice := list(_repeated(tree)):
        raise ConfigError("\n".join(f"{source}:{line}: {field}: is given twice" for line, field in twice))
    if values is None:
        return FleetConfig()
    if not isinstance(values, dict):
        raise ConfigError(f"{source}:1: a fleet is a mapping of fields: {', '.join(FleetConfig.model_fields)}")
    try:
        return FleetConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(source, tree, mistake) for mistake in error.errors())) from error


def _sentence(source: str, tree: yaml.Node | None, mistake: Any) -> str:
    location: tuple[str | int, ...] = mistake["loc"]
    field = ".".join(str(part) for part in location)
    line = _line(tree, location)
    if mistake["type"] == "extra_forbidden":
        allowed = ", ".join(_fields_at(location[:-1]))
        return f"{source}:{line}: {field}: no such field; allowed here: {allowed}"
    return f"{source}:{line}: {field}: {mistake['msg']} (got {mistake['input']!r})"


def _repeated(node: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Line and name of every key that its mapping has already; YAML would take the last one in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, str(key.value)
            seen.add(str(key.value))
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated(item)


def _line(node: yaml.Node | None, location: Sequence[str | int]) -> int:
    """Line of the deepest part of `location` that the file has."""
    line = node.start_mark.line + 1 if node else 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Names of the fields of the section at `location`; none if no section is there."""
    found: Any = FleetConfig
    for part in location:
        if isinstance(found, type) and issubclass(found, BaseModel):
            found = _section(found.model_fields[str(part)].annotation)
        elif get_origin(found) is dict:
            found = _section(get_args(found)[1])
        else:
            return []
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []


def _section(annotation: Any) -> Any:
    """What is meant by a type that may also be None."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if type(None) in get_args(annotation) and len(kinds) == 1 else annotation
