"""`score`, `embed` and `predict`: from a manifest to rows in Parquet, each exactly once.

In: a manifest and options. Out: finished outputs and their summaries. It builds on `engine` and `manifest`.
"""
