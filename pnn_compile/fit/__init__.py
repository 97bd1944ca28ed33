"""Fit a compiled network to a trained model: in closed form, by distillation, end to end.

In: a compiled network and samples. Out: the same network with other weights, and a report. Read
`calibrate.py` and `regression_sweep.py` first, then `train.py`.
"""
