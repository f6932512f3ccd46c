"""The stages on a Ray cluster: nodes, actor pools, paths that all nodes see, and jobs that are submitted.

In: the same chunks as `engine.threads`. Out: the same results, whatever dies on the way.
"""
