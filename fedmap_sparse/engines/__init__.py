"""Transports around `fedmap_sparse.fedmap`: they carry bytes, and know nothing of what is in them.

Import the one you use (`fedmap_sparse.engines.in_process`): each pulls in its own dependencies.
"""
