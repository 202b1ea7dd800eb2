"""Many users in one pass: each has a memory of their own, and nobody's answer holds a word of somebody else.

`write` and `ask` take lists. The rows share the weights of one pass, so ten users cost far less than ten passes.
"""

# %%
import latentmem

llm = latentmem.load("smollm2-135m")
users = {
    "Ada": "My dog is called Pepper. I live in Oslo.",
    "Bo": "My dog is called Captain. I live in Lima.",
    "Cy": "My dog is called Biscuit. I live in Cork.",
    "Di": "My dog is called Noodle. I live in Graz.",
}
memories = llm.write([llm.empty() for _ in users], list(users.values()), source="first message")

# %%
question = "What is my dog called?"
answers = llm.ask(memories, [question] * len(users), max_new_tokens=16)
for name, answer in zip(users, answers, strict=True):
    print(f"{name}: {answer}")

# %% One memory read alone gives the same answer as in the batch.
print("alone, Ada:", llm.ask(memories[0], question, max_new_tokens=16))
