"""Fresh examples only, and the same ones everywhere.

After each new example Hypothesis tries some five mutations of it, which repeat parts of it; of 220 examples some 40 were new,
and features drawn once in 20 went missing. A campaign wants the 220.

Hypothesis also draws integers from the source code of whatever modules the process has loaded, so the same seed gave other
examples under pytest, under xdist and alone. A gate must try the same examples on every machine.
"""

from contextlib import contextmanager, suppress

from hypothesis import Phase, given, settings
from hypothesis.internal.conjecture import engine, providers
from hypothesis.internal.conjecture.engine import ConjectureRunner


def same_everywhere() -> None:
    """From here on this process takes no constants from the modules that it has loaded. A Hypothesis that never does so
    already does what is wanted."""
    if getattr(providers, "_get_local_constants", _no_constants) is not _no_constants:
        providers._get_local_constants = _no_constants
        providers.CONSTANTS_CACHE.cache.clear()


def _no_constants():
    return providers.Constants()


@contextmanager
def fresh_examples():
    """No mutations inside, and the same examples everywhere."""
    same_everywhere()
    stock = getattr(ConjectureRunner, "generate_mutations_from", None)
    if stock is None:
        yield
        return
    ConjectureRunner.generate_mutations_from = lambda self, data: None
    try:
        yield
    finally:
        ConjectureRunner.generate_mutations_from = stock


@contextmanager
def shrinking_for(seconds: float):
    """Shrinking ends after so long: an example that ends its process on a GPU costs seconds, and five minutes, which is what
    Hypothesis allows, buys nothing that one minute does not."""
    stock = engine.MAX_SHRINKING_SECONDS
    engine.MAX_SHRINKING_SECONDS = seconds
    try:
        yield
    finally:
        engine.MAX_SHRINKING_SECONDS = stock


class Enough(BaseException):
    """Ends a search from inside: Hypothesis need not draw what nobody will look at."""


def each_distinct(strategy, budget: int, visit) -> None:
    """Call `visit` on so many distinct examples, the same ones every time; it may raise `Enough`."""
    distinct: set[str] = set()

    @settings(max_examples=2 * budget + 40, phases=[Phase.generate], database=None, derandomize=True, deadline=None)
    @given(strategy)
    def one(example) -> None:
        key = repr(example)
        if key not in distinct:
            distinct.add(key)
            visit(example)
            if len(distinct) == budget:
                raise Enough

    with fresh_examples(), suppress(Enough):
        one()
