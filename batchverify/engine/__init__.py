"""Who does the work: stages run in threads or on Ray, every image once, every block of pairs in order.

In: references and pairs of indices. Out: a gallery of vectors and reasons, probabilities.
Below: `embedding`, `heads`, `cache`, `faces`.
"""
