import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { Dialog, Problem } from "./Dialog";
import { count } from "./pool";
import { useWork } from "./util";

/** All memories that may be seen, and how to get another one. */
export function Memories(props: {
  all: api.MemoryInfo[];
  chosen: string;
  writes: boolean;
  choose: (id: string) => void;
  changed: () => Promise<void>;
}) {
  const [making, setMaking] = useState(false);
  const [bringing, setBringing] = useState<File | null>(null);
  const [wanted, setWanted] = useState("");
  const input = useRef<HTMLInputElement>(null);
  const many = props.all.length > 10;
  const shown = props.all.filter((one) => !many || one.id.toLowerCase().includes(wanted.toLowerCase()));
  return (
    <nav class="memories" aria-label="Memories">
      <div class="row">
        <h2 tabIndex={-1}>Memories</h2>
        <button class="primary small" hidden={!props.writes} onClick={() => setMaking(true)}>
          New
        </button>
      </div>
      {props.all.length === 0 && (
        <p class="quiet">{props.writes ? "None yet. Make one, write a text into it, and ask." : "None that this key may read."}</p>
      )}
      {many && (
        <label>
          <span class="unseen">Find a memory</span>
          <input type="search" placeholder="Find" value={wanted} onInput={(event) => setWanted(event.currentTarget.value)} />
        </label>
      )}
      {many && shown.length === 0 && <p class="quiet">There is none of that name.</p>}
      <ul class="plain">
        {shown.map((one) => (
          <li key={one.id}>
            <button
              class="memory"
              aria-current={one.id === props.chosen ? "true" : undefined}
              onClick={() => props.choose(one.id)}
            >
              <span class="name">{one.id}</span>
              <span class="quiet">
                {count(one.M)} of {count(one.N)} slots
              </span>
              <span class="meter" aria-hidden="true">
                <span style={{ width: `${(100 * one.M) / one.N}%` }} />
              </span>
            </button>
          </li>
        ))}
      </ul>
      <button class="small" hidden={!props.writes} onClick={() => input.current?.click()}>
        Import a file …
      </button>
      <input
        ref={input}
        type="file"
        accept=".zip"
        hidden
        aria-label="Exported memory"
        onChange={(event) => {
          setBringing(event.currentTarget.files?.[0] ?? null);
          event.currentTarget.value = "";
        }}
      />
      {making && <NewMemory {...props} onClose={() => setMaking(false)} />}
      {bringing && <Import {...props} file={bringing} onClose={() => setBringing(null)} />}
    </nav>
  );
}

type Making = { choose: (id: string) => void; changed: () => Promise<void>; onClose: () => void };

function NewMemory({ choose, changed, onClose }: Making) {
  const [name, setName] = useState("");
  const [room, setRoom] = useState("");
  const [longterm, setLongterm] = useState("");
  const make = async () => {
    const body = { id: name, ...(room ? { N: Number(room) } : {}), ...(longterm ? { longterm: Number(longterm) } : {}) };
    await api.create(body);
    await changed();
    choose(name);
  };
  return (
    <Dialog title="A new memory" act="Make it" onAct={make} onClose={onClose}>
      <Name value={name} set={setName} />
      <label>
        Slots in each layer
        <input type="number" min={1} max={1 << 24} placeholder="as the model makes them" value={room} onInput={(e) => setRoom(e.currentTarget.value)} />
        <small>About a token each. When they are full, old ones are dropped at random.</small>
      </label>
      <label>
        Slots that a question takes back from what was dropped
        <input type="number" min={0} max={1 << 24} placeholder="as the model makes them" value={longterm} onInput={(e) => setLongterm(e.currentTarget.value)} />
        <small>More than 0 keeps dropped slots in a long-term memory, for example 512. With 0 they are lost.</small>
      </label>
    </Dialog>
  );
}

function Import({ file, choose, changed, onClose }: Making & { file: File }) {
  const [name, setName] = useState(file.name.replace(/\.zip$/, "").replace(/[^A-Za-z0-9_-]/g, "-"));
  const take = async () => {
    await api.bring(name, file);
    await changed();
    choose(name);
  };
  return (
    <Dialog title={`Import ${file.name}`} act="Import" onAct={take} onClose={onClose}>
      <Name value={name} set={setName} />
    </Dialog>
  );
}

/** The name of a memory. */
export function Name({ value, set }: { value: string; set: (name: string) => void }) {
  return (
    <label>
      Name
      <input
        required
        maxLength={64}
        pattern="[A-Za-z0-9_][A-Za-z0-9_\-]*"
        title="Letters, digits, _ and -, at most 64"
        value={value}
        onInput={(event) => set(event.currentTarget.value)}
      />
    </label>
  );
}

/** Asks for the key that the server wants. */
export function KeyForm({ known, reason }: { known: () => void; reason: string }) {
  const [value, setValue] = useState("");
  const box = useRef<HTMLInputElement>(null);
  useEffect(() => box.current?.focus(), []);
  const work = useWork();
  const submit = (event: Event) => {
    event.preventDefault();
    void work.run(async () => {
      if (!/^[\x21-\x7e]+$/.test(value.trim())) throw new Error("A key looks like lm-..., without other signs.");
      api.key.set(value.trim());
      try {
        await api.model();
      } catch (error) {
        api.key.set("");
        throw error;
      }
      known();
    });
  };
  return (
    <main class="alone">
      <form onSubmit={submit} class="card">
        <h1>latentmem</h1>
        <p>This server asks for a key. Whoever runs it makes one with</p>
        <pre>latentmem keys add NAME --memories 'NAME'</pre>
        <label>
          Key
          <input ref={box} type="password" autocomplete="off" required value={value} onInput={(e) => setValue(e.currentTarget.value)} />
          <small>It is kept in this tab only, until you close it.</small>
        </label>
        <Problem text={work.error || reason} />
        <button class="primary" disabled={work.busy}>
          Go on
        </button>
      </form>
    </main>
  );
}
