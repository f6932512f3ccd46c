"""Who does the work: stages run in threads or on Ray, every image once, every block of pairs in order.

In: image paths and pairs of indices. Out: a table of vectors and reasons, probabilities.
Below: `embedding`, `heads`, `cache`, `faces`.
"""
