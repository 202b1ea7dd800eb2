"""A name or a path -> a model with a memory: the hub, the packaged model, trained adapters, released checkpoints."""
