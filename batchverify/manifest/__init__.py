"""Tables of image pairs: found, read, checked, prepared, and reduced to their unique images.

In: CSV, TSV and Parquet files. Out: blocks of rows, and each distinct image once. It builds on `storage`.
"""
