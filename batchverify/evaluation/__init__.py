"""`evaluate`: what finished scores are worth: figures, intervals, slices, comparisons, a report.

In: score outputs and a truth. Out: `metrics.json`, tables and pages. Below: `scoring`, `manifest`.
"""
