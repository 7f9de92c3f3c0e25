"""Loading a subject by file location, so that the root never lies on the worker's path."""

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BUILT_IN = {"kernels": ".", "plans": "plans.py", "eager": "eager", "sglang": "sglang"}


class SubjectError(Exception):
    """The subject cannot be loaded."""


class Subject:
    """The functions of one subject, looked up by contract.

    A built-in subject is a folder with one module per family, and any folder may be one; any other is a Python file (as
    `plans` is) or an importable module.
    """

    def __init__(self, spec: str, root: Path):
        self.spec = spec
        place = root / "kernels" / BUILT_IN[spec] if spec in BUILT_IN else Path(spec)
        self._folder = place if place.is_dir() else None
        self._name = f"plumbline_{spec if spec in BUILT_IN else Path(spec).name}"
        self._modules: dict[str, types.ModuleType | None] = {}
        if self._folder is None:
            self._modules["*"] = _user_module(str(place) if spec in BUILT_IN else spec, root)
        else:
            _package(self._name, self._folder)

    def module(self, family: str) -> types.ModuleType | None:
        """The module that would hold a family's functions, or None if the subject has none."""
        if self._folder is None:
            return self._modules["*"]
        if family not in self._modules:
            path = self._folder / f"{family}.py"
            self._modules[family] = self._imported(family, path) if path.exists() else None
        return self._modules[family]

    def _imported(self, family: str, path: Path) -> types.ModuleType:
        try:
            return importlib.import_module(f"{self._name}.{family}")
        except BaseException as error:  # as for a file: whatever it raises is a report to its author
            raise SubjectError(f"--subject {self.spec}: importing {path} raised {type(error).__name__}: {error}") from error

    def function(self, family: str, name: str):
        """The subject's function for a contract, or None (NOT PROVIDED)."""
        module = self.module(family)
        found = getattr(module, name, None) if module else None
        return found if callable(found) else None

    def describe(self, family: str, name: str, given: list[str]) -> dict:
        """What the suite wants to know before it draws cases.

        Raises:
            SubjectError: the function cannot be called with the keywords `given`, or a table such as VARIANTS is not
                what it must be.
        """
        module = self.module(family)
        rules, costs = lambda value: _is_table(value, _is_text), lambda value: _is_table(value, lambda _: True)
        variants = self._declared(module, "VARIANTS", rules, '{"contract": {"rule": "choice"}}')
        cost = self._declared(module, "COST", costs, '{"contract": {"launches": 2}}')
        missing = self._declared(module, "MISSING", _is_text, '{"contract": "why it is not there"}')
        self._callable(family, name, given)
        return {
            "provided": self.function(family, name) is not None,
            "variant": variants.get(name, {}),
            "chooses": list(variants),
            "version": str(getattr(module, "VERSION", "")),
            "cost": cost.get(name, {}),
            "capturable": bool(getattr(module, "CAPTURABLE", self.spec == "kernels")),
            "selective": hasattr(module, "supports"),
            "missing": missing.get(name, ""),
        }

    def _declared(self, module: types.ModuleType | None, name: str, holds: Callable, shown: str) -> dict[str, Any]:
        """A table by contract that a module declares, as VARIANTS, the rules it follows; the suite knows which there are."""
        table = getattr(module, name, {})
        if not _is_table(table, holds):
            raise SubjectError(f"--subject {self.spec}: {name} is {table!r}; it must be {shown}")
        return table

    def _callable(self, family: str, name: str, given: list[str]) -> None:
        function = self.function(family, name)
        try:
            inspect.signature(function or dict).bind(**dict.fromkeys(given))
        except TypeError as error:
            raise SubjectError(f"--subject {self.spec}: {name}() cannot be called by keyword as the contract does: {error}; "
                               f"write def {name}(*, {', '.join(given)})") from None
        except ValueError:  # a function of native code has no signature
            return

    def supports(self, family: str, case: dict) -> str:
        """Why the subject does not take a case, or '' if it does. A subject without `supports` takes every case.

        Raises:
            SubjectError: the answer is neither true or false nor a reason.
        """
        module = self.module(family)
        answer = module.supports(case) if hasattr(module, "supports") else True
        if not (answer is None or isinstance(answer, (bool, np.bool_, str))):
            raise SubjectError(f"answered {answer!r}, and must answer True, False, None or a str that says why not")
        return str(answer or "supports() said no") if isinstance(answer, str) or not answer else ""


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_table(value, holds: Callable) -> bool:
    """Whether a value is a dict from texts to what `holds` takes."""
    return isinstance(value, dict) and all(isinstance(k, str) and holds(v) for k, v in value.items())


def _package(name: str, folder: Path) -> None:
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def _user_module(spec: str, root: Path) -> types.ModuleType:
    path = root / spec
    try:
        if path.suffix == ".py":
            if not path.exists():
                raise SubjectError(f"--subject {spec}: no such file")
            loader = importlib.util.spec_from_file_location(f"plumbline_subject_{path.stem}", path)
            module = importlib.util.module_from_spec(loader)
            sys.modules[loader.name] = module
            loader.loader.exec_module(module)
            return module
        return importlib.import_module(spec)
    except ModuleNotFoundError as error:
        if error.name != spec:
            raise SubjectError(f"--subject {spec}: importing it failed: {error}") from error
        raise SubjectError(f"--subject {spec}: neither a built-in ({', '.join(BUILT_IN)}), a .py file nor a module") from None
    except SubjectError:
        raise
    except BaseException as error:  # whatever a user's module raises at import is a report to its author
        raise SubjectError(f"--subject {spec}: importing it raised {type(error).__name__}: {error}") from error
