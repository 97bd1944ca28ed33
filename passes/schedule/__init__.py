"""What every rank does in a step, as plain lists of instructions: checked, and simulated.

In: a `Plan`. Out: instruction lists, a proof that they cannot deadlock, the time that they take.
Read `instruction.py` first, then `lists.py`, which orders the messages.
"""
