"""Case files: one example as JSON, replayable anywhere. Data only: loading one builds frozen dataclasses, nothing else."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TextIO

from harness import registry
from harness.contract import Case
from harness.differential import Example
from harness.findings import Found
from harness.layout import Layout, Place

FORMAT_VERSION = 2  # 1 left out the fields that had their default
BODY = ("format_version", "contract", "variant", "steps", "layout", "program_order", "fills", "outside")  # decides the replay


class CaseFileError(ValueError):
    """A file that is no case of a format this version reads."""


@dataclass(frozen=True)
class Saved:
    """What a case file holds."""

    example: Example
    variant: Mapping[str, str]
    subject: str
    finding: Mapping[str, str | bool]
    versions: Mapping[str, str]


def encode(value):
    """A case as JSON values; dataclasses carry their type's name. Every field is written down: a default that changes later
    must not make another case of a saved one."""
    if is_dataclass(value):
        return {"type": type(value).__name__, **{f.name: encode(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    return value


def encode_layout(layout: Layout) -> dict:
    return {
        "places": {n: {"kind": p.kind, "dtype": p.dtype, "guard": p.guard} for n, p in sorted(layout.places.items())},
        "aliases": [list(pair) for pair in layout.aliases],
    }


def encode_calls(example: Example) -> list[dict]:
    """Every step as a subject's `supports(case)` sees it."""
    layout = encode_layout(example.layout)
    return [{"contract": case.contract.name, "case": encode_full(case), "layout": layout} for case in example.steps]


def encode_full(value):
    """A case without the names of its types."""
    if is_dataclass(value):
        return {f.name: encode_full(getattr(value, f.name)) for f in fields(value)}
    return [encode_full(v) for v in value] if isinstance(value, tuple) else value


def document(example: Example, variant: Mapping[str, str], subject: str, versions: Mapping[str, str],
             found: Found | None) -> dict:
    """Everything that a case file holds, ready for JSON."""
    body = {
        "format_version": FORMAT_VERSION,
        "contract": example.contract.name,
        "variant": dict(variant),
        "steps": [{"contract": case.contract.name, "case": encode(case)} for case in example.steps],
        "layout": encode_layout(example.layout),
        "program_order": example.layout.order,
        "fills": {"hash": "splitmix64", "seed": example.seed},
        "outside": example.outside,
    }
    finding = {"check": found.check, "buffer": found.buffer, "sentence": found.sentence, "alone": found.alone} if found else {}
    return {**body, "subject": subject, "versions": dict(versions), "finding": finding, "digest": _digest(body)}


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Note:
    """The case file of the example that is being tried, which only a crash of this process leaves behind. There is one for
    every example, so the file stays open."""

    def __init__(self, path: Path):
        self.path = path
        self._file: TextIO | None = None

    def write(self, content: dict) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
        self._file.seek(0)
        self._file.write(json.dumps(content))
        self._file.truncate()
        self._file.flush()

    def remove(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.path.unlink(missing_ok=True)


def write(path: Path, content: dict) -> Path:
    """Write a case file so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read(path: Path) -> Saved:
    """Load a case file.

    Raises:
        CaseFileError: not a case file, a newer format, an unknown contract or field, or contents that were edited.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CaseFileError(f"{path}: not readable as a case file ({error}); failures/ has those of the last runs") from None
    if not isinstance(content, dict) or "format_version" not in content:
        raise CaseFileError(f"{path}: not a case file (no format_version)")
    if content["format_version"] != FORMAT_VERSION:
        raise CaseFileError(f"{path}: format_version {content['format_version']}; this version reads {FORMAT_VERSION}: use the "
                            "version of plumbline that wrote it")
    try:
        saved = _decode(path, content)
        if _digest({key: content[key] for key in BODY}) != content["digest"]:
            raise CaseFileError(f"{path}: its digest does not match its contents")
        return saved
    except CaseFileError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CaseFileError(f"{path}: incomplete or malformed ({type(error).__name__}: {error})") from None


def _decode(path, content: dict) -> Saved:
    for key, kind in (("subject", str), ("outside", str), ("variant", dict), ("finding", dict), ("versions", dict)):
        if not isinstance(content[key], kind):
            raise CaseFileError(f"{path}: {key!r} is {content[key]!r}, and must be a {kind.__name__}")
    steps = tuple(_build(path, step["case"], _contract(path, step["contract"]).case) for step in content["steps"])
    if not steps:
        raise CaseFileError(f"{path}: incomplete or malformed (it has no steps)")
    places = {n: Place(p["kind"], p["dtype"], p["guard"]) for n, p in content["layout"]["places"].items()}
    aliases = tuple((a, b) for a, b in content["layout"]["aliases"])
    example = Example(steps, Layout(places, aliases, int(content["program_order"])), int(content["fills"]["seed"]),
                      content["outside"])
    return Saved(example, content["variant"], content["subject"], content["finding"], content["versions"])


def _contract(path, name: str):
    if name not in registry.contracts():
        raise CaseFileError(f"{path}: unknown contract {name!r}; known are {', '.join(registry.contracts())}")
    return registry.contracts()[name]


def _build(path, value: dict, expected: type[Case]):
    """A case or one of its requests: only frozen dataclasses of the module that declares the case are built."""
    name = value["type"]
    kind = expected if name == expected.__name__ else getattr(sys.modules[expected.__module__], name, None)
    if not (isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == expected.__module__):
        raise CaseFileError(f"{path}: {expected.__module__} has no case type {name!r}")
    given = {k: _value(path, v, expected) for k, v in value.items() if k != "type"}
    unknown = sorted(set(given) - {f.name for f in fields(kind)})
    if unknown:
        raise CaseFileError(f"{path}: {name} has no field {unknown[0]!r}")
    return kind(**given)


def _value(path, value, expected: type[Case]):
    if isinstance(value, list):
        return tuple(_value(path, v, expected) for v in value)
    if isinstance(value, dict):
        return _build(path, value, expected)
    return value
