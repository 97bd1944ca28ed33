"""Forecast the time of a step on N devices, of parareal networks and of other methods.

In: a model or a compiled network, and device profiles. Out: a table. Read `forecast.py` first, then
`compare_methods.py`; `devices/` contains the built-in profiles.
"""
