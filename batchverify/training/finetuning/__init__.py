"""Fine-tuning: the last blocks of a backbone learn from labelled pairs or people; what comes out is a backbone.

In: labelled manifests and a backbone. Out: weights, a record and a model card. Mainly uses the rooms `engine`,
`embedding` and `faces`. `finetune` is the workflow; `fit` the training itself, on what the frozen blocks give.
"""
