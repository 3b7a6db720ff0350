"""Devices: how they are arranged, what lies where, what they tell each other.

The model knows logical dims, the letters of the legend. Here alone are mesh axes:
`table` maps one to the other, `placement` hands the model values that do.
"""
