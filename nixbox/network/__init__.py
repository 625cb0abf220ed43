"""A machine's network: a namespace of its own, what may leave it, and the process that watches over it."""
