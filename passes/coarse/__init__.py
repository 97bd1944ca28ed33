"""Families of cheap networks: preprocessing operators C_j and coarse propagators F_j.

In: types of the states, and a `CoarseSpec`. Out: modules, their costs, and closed-form fits. Read
`family.py` first: it lists the families.
"""
