"""From an image to a face: read and decode it, detect faces, crop one.

In: an absolute path or URI. Out: a square uint8 RGB face, or the reason why there is none.
Below: `storage`, `kernels`, `runtime`.
"""
