"""Everything that the package asks of transformers, torch and PEFT: layers, caches, attention, hooks, adapters."""
