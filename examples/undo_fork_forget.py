"""Change your mind: undo a write, try something in a fork, forget a source without a trace.

A `Store` keeps every version of a memory by name, and what it has acknowledged survives a crash.
"""

# %%
import tempfile

import latentmem

llm = latentmem.load("smollm2-135m")
store = latentmem.Store(tempfile.mkdtemp())
store.create("work", llm.empty())
store.write(llm, "work", "The bell of the chapel was cast in Ghent.", source="bell.txt")
store.write(llm, "work", "The code of the safe is 4711.", source="secret.txt")

# %% A fork goes on from here and costs a row, no copy. The origin does not see what is written into the fork.
store.fork("work", "trial")
store.write(llm, "trial", "The pier is painted yellow.", source="pier.txt")
print("trial has", [source.source for source in store.stats("trial")])
print("work has ", [source.source for source in store.stats("work")])

# %% Undo takes the newest version back, and rollback brings any version again.
store.undo("work")
print("undone:   ", [source.source for source in store.stats("work")])
store.rollback("work", 2)
print("restored: ", store.ask(llm, "work", "What is the code of the safe?"))

# %% Forget without a trace: in every version and every fork, as if the text had never been written.
store.forget_by_replay(llm, "work", "secret.txt")
print("forgotten:", [source.source for source in store.stats("work")], [x.source for x in store.stats("trial")])
print("the others stay:", store.ask(llm, "work", "Where was the bell cast?"))
for version in store.history("work"):
    print(version.version, version.event, version.source or "")
