"""What a memory is measured against: fine-tuning, ROME, retrieved passages."""
