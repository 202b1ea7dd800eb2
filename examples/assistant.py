"""An assistant that remembers, through OpenAI's client: a new conversation knows what an older one was told.

Start `latentmem serve` in another shell first. The model "smollm2-135m@ada" is the model with the memory "ada".
"""

# %%
import os

import openai

url = os.environ.get("LATENTMEM_URL", "http://127.0.0.1:8000")
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
model = next(model.id for model in client.models.list() if "@" not in model.id)


def said(text, model, **options):
    """The answer to one message, with which a conversation begins."""
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, max_tokens=40, **options)


# %% A memory "ada", and a message that is written into it.
client.post("/memories", body={"id": "ada", "exist_ok": True}, cast_to=object)
message = "The key of the boat house is under the blue pot."
answer = said(message, model, extra_body={"memory": {"id": "ada", "write": "user"}})
print("you:", message)
print("assistant:", answer.choices[0].message.content, answer.memory)

# %% A new conversation: all that the model knows of the older one is the memory.
question = "Where is the key of the boat house?"
print("you:", question)
print("assistant:", said(question, f"{model}@ada").choices[0].message.content)
print("the model without a memory:", said(question, model).choices[0].message.content)
