"""From two embeddings to a probability: pair features, scorers, and the stored head.

In: (N, D) vectors and pairs of rows. Out: probabilities and cosine similarities. Below: `storage`, `kernels`.
"""
