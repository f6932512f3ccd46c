"""The embedding cache that runs share: Parquet segments by content key, and their maintenance.

In: keys, vectors, reasons. Out: the same, whenever a later run asks. Below: `storage`, `faces`.
"""
