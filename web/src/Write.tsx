import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { Problem } from "./Dialog";
import { useKept } from "./kept";
import { count, named } from "./pool";
import { useLatest, words } from "./util";

interface Job {
  key: string; // makes a write happen once, however often it is sent
  what: Parameters<typeof api.write>[1];
  name: string;
  about: string; // a failure is shown until the same is sent again
  version: number | null; // once it is accepted
  state: "sent" | "waiting" | "written" | "failed";
  error: string;
}

/** Write texts or files into a memory, and see how far it has come; one can go on typing meanwhile. */
export function Write(props: { id: string; slots: api.Slots | null; info: api.MemoryInfo | null; refresh: () => void }) {
  const { id, slots, info, refresh } = props;
  const [text, setText] = useKept(`text ${id}`, "");
  const [source, setSource] = useKept(`source ${id}`, "");
  const [jobs, setJobs] = useKept<Job[]>(`jobs ${id}`, []);
  const [keys, setKeys] = useKept<Record<string, string>>(`keys ${id}`, {}); // of what was sent and not answered
  const [over, setOver] = useState(false);
  const input = useRef<HTMLInputElement>(null);
  const line = useRef<Promise<void>>(Promise.resolve()); // what is sent waits for what was sent before
  const latest = useLatest({ text });

  const change = (key: string, to: Partial<Job>) =>
    setJobs((now) => now.map((job) => (job.key === key ? { ...job, ...to } : job)));

  function send(what: Job["what"]) {
    const same = "text" in what ? [what.source, what.text] : [what.file.name, what.file.size, what.file.lastModified];
    const attempt = JSON.stringify(same); // what is sent again, because no answer came, is written once
    const key = keys[attempt] ?? api.newKey();
    setKeys((now) => ({ ...now, [attempt]: key }));
    const name = "text" in what ? what.source : what.file.name;
    const about = "text" in what ? attempt : name;
    const stays = (job: Job) =>
      job.key !== key && (job.state === "failed" ? job.about !== about : job.state !== "written");
    setJobs((now) => [
      ...now.filter(stays),
      { key, what, name, about, version: null, state: "sent", error: "" },
    ]);
    line.current = line.current.then(async () => {
      try {
        const { version, state } = await api.write(id, what, key);
        change(key, { version, state: state === "applied" ? "written" : "waiting" });
        setKeys(({ [attempt]: _, ...others }) => others);
        if ("text" in what && latest.current.text === what.text) setText("");
      } catch (error) {
        change(key, { state: "failed", error: words(error) });
      }
      refresh();
    });
  }

  const sending = jobs.some((job) => job.state === "sent");
  const submit = (event: Event) => {
    event.preventDefault();
    if (!sending && text.trim()) send({ text, source: source.trim() || "text" });
  };
  const files = (some: FileList | null | undefined) => {
    for (const file of some ?? []) send({ file }); // its name is its source
  };

  // what was accepted is in the memory when nothing of it waits any more; then one asks what became of it
  const settled = info !== null && info.pending === 0;
  const asking = useRef(new Set<string>());
  useEffect(() => {
    if (!settled) return;
    for (const job of jobs) {
      const { key, version } = job;
      if (job.state !== "waiting" || version === null || version >= info.versions || asking.current.has(key)) continue;
      asking.current.add(key);
      api
        .history(id, version + 1, 1)
        .then(({ data: [found] }) => {
          const bad = found?.version === version && found.state === "failed";
          change(key, bad ? { state: "failed", error: found.error ?? "it failed" } : { state: "written" });
        })
        .catch(() => undefined) // asked again when the memory is looked at again
        .finally(() => asking.current.delete(key));
    }
  }, [info, jobs]);

  const now = slots?.writing;
  const open = jobs.filter((job) => job.state === "sent" || job.state === "waiting");
  const last = jobs.filter((job) => job.state === "written");
  const dragged = (event: DragEvent) => event.dataTransfer?.types.includes("Files");
  return (
    <section
      class={`write card ${over ? "over" : ""}`}
      aria-labelledby="write-title"
      onDragOver={(event) => {
        if (!dragged(event)) return;
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        setOver(false);
        if (!dragged(event)) return;
        event.preventDefault();
        files(event.dataTransfer?.files);
      }}
    >
      <h3 id="write-title">Write into it</h3>
      <form onSubmit={submit}>
        <label>
          <span class="unseen">Text</span>
          <textarea
            dir="auto"
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
              dir="auto"
              placeholder="where it is from, such as diary"
              maxLength={256}
              value={source}
              onInput={(event) => setSource(event.currentTarget.value)}
            />
          </label>
          <button type="button" onClick={() => input.current?.click()}>
            File …
          </button>
          <button class="primary" aria-disabled={!text.trim() || sending}>
            Write
          </button>
        </div>
      </form>
      <input
        ref={input}
        type="file"
        multiple
        hidden
        accept="text/*,.md,.txt,.csv,.json,.py,.log,.pdf,.docx,.pptx,.xlsx,.html,.epub,.eml,.rtf,.odt,.ods,.odp,.xls"
        aria-label="Files to write"
        onChange={(event) => {
          files(event.currentTarget.files);
          event.currentTarget.value = "";
        }}
      />
      {(now || open.length > 0 || (info?.pending ?? 0) > 0) && (
        <label class="progress">
          {now ? `${count(now.done)} of ${count(now.total)} tokens written` : "Waiting for its turn …"}
          <progress {...(now ? { value: now.done, max: now.total } : {})} />
        </label>
      )}
      <p class="quiet" aria-live="polite">
        {open.length > 0
          ? `Writing: ${open.map((job) => named(job.name)).join(", ")}.`
          : last.length > 0 && `Written: ${last.map((job) => named(job.name)).join(", ")}.`}
      </p>
      {jobs
        .filter((job) => job.state === "failed")
        .map((job) => (
          <div key={job.key} class="row">
            <div class="grow">
              <Problem text={`${named(job.name)}: ${job.error}`} />
            </div>
            <button class="small" onClick={() => send(job.what)}>
              Try again
            </button>
            <button class="small" onClick={() => setJobs((now) => now.filter((one) => one !== job))}>
              Dismiss
            </button>
          </div>
        ))}
    </section>
  );
}
