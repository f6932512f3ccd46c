"""The command line: options in, a workflow called, its errors as one line. Entered at `app.main`.

In: arguments. Out: an exit code, a summary, Parquet files. Every room lies below.
"""
