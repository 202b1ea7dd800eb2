"""Memories over the network: one model, many memories, many clients at once (read `service.py` first)."""
