"""Write a text into a memory, ask the memory, keep it in a file.

The model is never told the text again: the answer comes from vectors. Without the memory the model can only guess.
"""

# %%
import latentmem

llm = latentmem.load("smollm2-135m")
memory = llm.write(llm.empty(), "The lease of the red house was signed by Ada Brix, a plumber from Oslo.", "lease.txt")
print(f"{memory.tokens} tokens fill {memory.M} of {memory.N} slots in each of {memory.L} layers")

# %%
question = "Who signed the lease?"
print("with the memory:   ", llm.ask(memory, question))
print("without the memory:", llm.ask(llm.blank(), question, max_new_tokens=24))

# %%
memory.save("work.safetensors")
again = latentmem.Memory.load("work.safetensors")
print("from the file:     ", llm.ask(again, question))
