"""From images to vectors: backbones and their weights, the networks that run them, and the embedder.

In: decoded images. Out: (N, D) float32 unit vectors, or reasons. Below: `faces`, `runtime`.
"""
