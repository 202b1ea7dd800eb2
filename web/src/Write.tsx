import { useRef, useState } from "preact/hooks";
import * as api from "./api";
import { Problem } from "./Dialog";
import { count } from "./pool";
import { sleep, useWork } from "./util";

/** Write a text or files into a memory, and see how far it has come. */
export function Write({ id, slots, refresh }: { id: string; slots: api.Slots | null; refresh: () => void }) {
  const [text, setText] = useState("");
  const [source, setSource] = useState("");
  const [over, setOver] = useState(false);
  const [done, setDone] = useState("");
  const work = useWork();
  const input = useRef<HTMLInputElement>(null);

  const write = (name: string, what: Parameters<typeof api.write>[1]) => async () => {
    setDone("");
    const { version } = await api.write(id, what);
    refresh();
    await settled(id, version);
    refresh();
    setDone(`Written: ${name}.`);
  };
  const files = (some: FileList | null | undefined) => {
    const all = [...(some ?? [])];
    if (all.length) void work.run(async () => { for (const file of all) await write(file.name, { file })(); }); // prettier-ignore
  };
  const submit = async (event: Event) => {
    event.preventDefault();
    const name = source.trim() || "text";
    if (await work.run(write(name, { text, source: name }))) setText("");
  };
  const now = slots?.writing;
  return (
    <section
      class={`write card ${over ? "over" : ""}`}
      aria-labelledby="write-title"
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        if (!work.busy) files(event.dataTransfer?.files);
      }}
    >
      <h3 id="write-title">Write into it</h3>
      <form onSubmit={submit}>
        <label>
          <span class="unseen">Text</span>
          <textarea
            rows={3}
            required
            placeholder="A text to be remembered; or drop a file here"
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
          />
        </label>
        <div class="row">
          <label class="grow">
            <span class="unseen">Source</span>
            <input
              placeholder="where it is from, such as diary"
              maxLength={256}
              value={source}
              onInput={(event) => setSource(event.currentTarget.value)}
            />
          </label>
          <button type="button" disabled={work.busy} onClick={() => input.current?.click()}>
            File …
          </button>
          <button class="primary" disabled={work.busy || !text.trim()}>
            Write
          </button>
        </div>
      </form>
      <input
        ref={input}
        type="file"
        multiple
        hidden
        accept="text/*,.md,.txt,.csv,.json,.py,.log"
        aria-label="Files to write"
        onChange={(event) => {
          files(event.currentTarget.files);
          event.currentTarget.value = "";
        }}
      />
      <div aria-live="polite">
        {(work.busy || now) && (
          <label class="progress">
            {now ? `${count(now.done)} of ${count(now.total)} tokens written` : "Waiting for its turn …"}
            <progress {...(now ? { value: now.done, max: now.total } : {})} />
          </label>
        )}
        {!work.busy && !now && done && <p class="quiet">{done}</p>}
      </div>
      <Problem text={work.error} />
    </section>
  );
}

/** Wait until a write is in the memory, or say why it never will be. */
async function settled(id: string, version: number | null): Promise<void> {
  while (version !== null) {
    const line = (await api.history(id, version + 1, 1)).data[0];
    if (line?.version !== version || line.state === "applied") return;
    if (line.state === "failed") throw new Error(`It could not be written: ${line.error}.`);
    await sleep(300);
  }
}
