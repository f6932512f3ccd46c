"""From an image to a face: bytes decoded, faces found, crops taken.

In: an absolute path or URI. Out: (160, 160, 3) uint8 faces, or the reason why there is none.
Below: `storage`, `kernels`, `runtime`.
"""
