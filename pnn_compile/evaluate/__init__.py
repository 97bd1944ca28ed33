"""Evaluate a compiled network: verify it, iterate it, assess it against early exits.

In: a compiled network and samples. Out: reports. Read `verify.py` first.
"""
