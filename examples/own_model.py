"""Your own model: any of 27 families of decoders has a memory at once, without training.

LATENTMEM_MODEL names a folder, a .gguf file or a hub id; by default a tiny model of random weights is made on the spot.
What can be checked without training: a memory that is not full is the text in the context, to rounding.
"""

# %%
import os
import tempfile

import latentmem
from latentmem.testing import byte_tokenizer, tiny_model


def made():
    """A folder with a model of random weights and a tokenizer of bytes, as `save_pretrained` makes it."""
    folder = tempfile.mkdtemp()
    tiny_model("qwen3").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


llm = latentmem.load(os.environ.get("LATENTMEM_MODEL") or made(), dtype="float32", device="cpu")
print(f"{type(llm.base).__name__}: {llm.decoder.L} layers of width {llm.decoder.d}")

# %%
text, question = llm.tokens("The bell of the chapel was cast in Ghent.", "raw"), llm.tokens("Where was it?", "raw")
memory = llm.write_ids(llm.empty(form="exact", longterm=0), text)
behind_memory = llm.logits(memory, question)
in_context = llm.logits(llm.blank(), [llm.first_token, *text, *question])[-len(question) :]
print(f"largest difference of logits: {(behind_memory - in_context).abs().max():.1e}")
print(f"and of an empty memory:       {(llm.logits(llm.blank(), question) - in_context).abs().max():.1e}")
