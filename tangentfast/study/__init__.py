"""The task-arithmetic experiments: where their weights and images come from, and how they run.

Needs the extra `study`; the library does not.
"""
