"""The engine: one thread that computes for all requests; it knows no HTTP."""
