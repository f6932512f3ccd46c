"""The command line. It parses options, calls a workflow and shows errors in one line. Entry point: `app.main`.

In: arguments. Out: an exit code, a summary, Parquet files. It may import every other room.
"""
