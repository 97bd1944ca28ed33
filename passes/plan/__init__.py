"""`Plan`: every decision of the compiler as data, and how it is built, checked and edited.

In: an `Analysis`, cuts and options. Out: a `Plan`. Read `schema.py` first, then `build.py` and
`num_stages.py`, which calls it.
"""
