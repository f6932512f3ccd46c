"""Loops over pixels, boxes and pairs, each compiled by numba and in plain numpy.

In: arrays. Out: arrays, with the same bits from both. `loops.py` chooses between them. No room lies below.
"""
