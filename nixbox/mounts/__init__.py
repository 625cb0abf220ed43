"""Directories of the host in a guest: what may be shared, the process that shares it, and its jail."""
