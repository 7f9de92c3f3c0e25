"""Which lines of one file a call executes: what tells a mutant's examples from the rest."""

import sys
from collections.abc import Callable


def lines(path: str, function: Callable) -> tuple[object, list[int]]:
    """The call's result, and the executed lines of `path`, sorted. Kernels count where the interpreter runs them."""
    seen: set[int] = set()

    def inside(frame, event, argument):
        seen.add(frame.f_lineno)
        return inside

    def entered(frame, event, argument):
        return inside(frame, event, argument) if frame.f_code.co_filename == path else None

    sys.settrace(entered)
    try:
        returned = function()
    finally:
        sys.settrace(None)
    return returned, sorted(seen)
