"""Hypothesis strategies, a public product: requests, batches, page tables and layouts, each documented and tested.

One function per contract, of the contract's name, in the module of its family. They shrink to what an engineer would
write by hand: a request is one list element, structure and a seed are drawn, table cells never.
"""
