"""Files: one container for all that the package writes, and the snapshot of a memory in it."""
