"""Save a compiled network as a directory, and load it without running or unpickling anything.

In: a compiled network. Out: plan.json, program.json and tensors. Read `directory.py` first.
"""
