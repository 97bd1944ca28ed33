"""Judge a compiled network: oracles, iterations, and what a user could do instead.

In: a compiled network, and samples. Out: reports. Read `verify.py` first.
"""
