"""`train`: a head from labelled pairs: fitted, calibrated, with thresholds, and searched for on Ray.

In: labelled manifests. Out: a head. Below: `scoring`, `evaluation` (its figures), `heads`.
"""
