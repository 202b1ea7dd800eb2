"""A language model with a memory: the verbs, and what they are made of."""
