"""Choose the cuts: the step-time objective as pure numbers, and searches that prove their answer.

In: an `Analysis` and options. Out: cuts with the proof of how good they are. Read `problem.py`
first, then `choose_cuts.py`, which fills it from an analysis.
"""
