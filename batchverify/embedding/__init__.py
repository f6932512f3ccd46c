"""From images to vectors: backbones and their weights, the networks that run them, and the embedder.

In: decoded images. Out: (N, 512) float32 unit vectors, or reasons. Below: `faces`, `runtime`.
"""
