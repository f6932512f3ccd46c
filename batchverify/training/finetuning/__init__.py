"""`finetune`: the last blocks of a backbone learn from labelled pairs, while what lies before them stays frozen.

In: labelled manifests and a backbone. Out: a backbone's weights. Below: `engine`, `embedding`, `faces`.
"""
