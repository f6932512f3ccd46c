"""The embedding cache that runs share: Parquet segments by content key, and their maintenance.

In: keys, vectors, reasons. Out: the same, in later runs. Below: `storage`.
"""
