"""Memories over the network: one model, many memories, many clients at once (read `engine/service.py` first)."""
