"""Save a compiled network as a directory, and load it without unpickling or running its code.

In: a compiled network. Out: plan.json, program.json and tensors (docs/artifacts.md). Read
`directory.py` first, then `program_json.py`; `functions.py` and `modules.py` list what may be
stored.
"""
