"""Fine-tuning: the last blocks of a backbone learn from labelled pairs or people; what comes out is a backbone.

`fit` is the training itself, on activations of the frozen blocks; `distributed` runs it in several processes.
"""
