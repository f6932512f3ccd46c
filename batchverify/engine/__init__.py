"""Engines run the stages in threads or on Ray: every image once, every block of pairs in order.

In: image paths and pairs of image indices. Out: a table of vectors and reasons, then probabilities.
Below: `embedding`, `heads`, `cache`, `faces`.
"""
