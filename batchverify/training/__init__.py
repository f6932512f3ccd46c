"""`train`: a head from labelled pairs: its fit, calibration and thresholds, and the search on Ray.

In: labelled manifests. Out: a head. Below: `scoring`, `evaluation` (its figures), `heads`.
"""
