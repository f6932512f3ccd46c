"""Bytes in and out: local paths and object stores under one name, and work in background threads.

In: paths and URIs. Out: locations, file systems, bytes. No room lies below.
"""
