"""From a program and a plan to networks: fine stages, operators, the parareal `GraphModule`.

In: a `Program` and a `Plan`. Out: modules; nothing is decided here. Read `assemble.py` first.
"""
