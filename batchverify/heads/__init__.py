"""From two embeddings to a probability: pair features, scorers, and the head that is stored.

In: (N, 512) vectors and pairs of rows. Out: probabilities, labels, cosine similarities. Below: `storage`, `kernels`.
"""
