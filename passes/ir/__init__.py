"""The captured program and the ways to run it; every other room builds on this one.

In: a user's module and example inputs. Out: `Program`, subgraphs of it, and runs that leave no
trace. Read `program.py` first.
"""
