"""The engine on a Ray cluster: its nodes and actors, the paths that all nodes must see, submitted commands.

In: the same chunks as `engine.threads`. Out: the same results, even if workers and nodes die.
"""
