"""Where a program can be cut: legal cuts, repeated blocks, side values, dependence on inputs.

In: a `Program` with facts and costs. Out: an `Analysis`, which decides nothing. Read
`cut_points.py` first: it says which cut is legal.
"""
