"""Transports around `fedmap_sparse.federated`: they carry bytes and do not look into them.

Import the one you use (`fedmap_sparse.engines.in_process`): each pulls in its own dependencies.
"""
