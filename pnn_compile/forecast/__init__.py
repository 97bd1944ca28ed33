"""What a step takes on N devices, before any of it is built, beside other methods.

In: a model or a compiled network, and device profiles. Out: a table. Read `forecast.py` first;
`devices/` holds the built-in profiles.
"""
