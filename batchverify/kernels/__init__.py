"""Loops over pixels, boxes and pairs: compiled by numba, each with a plain twin in numpy.

In: arrays. Out: arrays, the same bits from both. `loops.py` is the door that chooses. No room lies below.
"""
