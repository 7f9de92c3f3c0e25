"""Fresh examples only. After each new example Hypothesis tries some five mutations of it, which repeat parts of it; of 220
examples some 40 were new, and features drawn once in 20 went missing. A campaign wants the 220."""

from contextlib import contextmanager

from hypothesis.internal.conjecture.engine import ConjectureRunner


@contextmanager
def fresh_examples():
    """No mutations inside. A Hypothesis without this part of its engine already does what is wanted."""
    stock = getattr(ConjectureRunner, "generate_mutations_from", None)
    if stock is None:
        yield
        return
    ConjectureRunner.generate_mutations_from = lambda self, data: None
    try:
        yield
    finally:
        ConjectureRunner.generate_mutations_from = stock
