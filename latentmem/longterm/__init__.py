"""Long-term memory (M+): dropped slots are kept, and a question searches them (letters: `latentmem.core`)."""
