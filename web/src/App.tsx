import { useCallback, useEffect, useState } from "preact/hooks";
import * as api from "./api";
import { Chat } from "./Chat";
import { Dialog, Problem } from "./Dialog";
import { Fork, History } from "./History";
import { KeyForm, Memories } from "./Memories";
import { useMemory } from "./memory";
import { Pool } from "./Pool";
import { bytes, sleep, useWork, words } from "./util";
import { Sources } from "./Sources";
import { Write } from "./Write";

type Place = "memories" | "chat" | "memory" | "history"; // one of them is seen on a narrow screen
const PLACES: [Place, string][] = [["memories", "Memories"], ["chat", "Chat"], ["memory", "Memory"], ["history", "History"]]; // prettier-ignore

export function App() {
  const [state, setState] = useState<"loading" | "key" | "there">("loading");
  const [model, setModel] = useState("");
  const [all, setAll] = useState<api.MemoryInfo[]>([]);
  const [chosen, setChosen] = useState(() => decodeURIComponent(location.hash.slice(1)));
  const [place, setPlace] = useState<Place>("chat");
  const [error, setError] = useState("");

  const refused = useCallback((failed: unknown) => {
    if (failed instanceof api.Failed && failed.status === 401) setState("key");
    else if (failed instanceof api.Failed && failed.status === 503) setState("loading");
    else if (failed instanceof api.Failed && failed.status === 404) void list();
    setError(words(failed));
  }, []);

  const list = useCallback(async () => {
    const found = await api.memories();
    setAll(found);
    setChosen((now) => (found.some((one) => one.id === now) ? now : (found[0]?.id ?? "")));
    setError("");
  }, []);

  useEffect(() => {
    if (state !== "loading") return;
    let ended = false;
    void (async () => {
      while (!ended) {
        try {
          if (await api.ready()) {
            setModel(await api.model());
            await list();
            setState("there");
            return;
          }
        } catch (failed) {
          if (ended) return;
          refused(failed);
          if (failed instanceof api.Failed && failed.status === 401) return;
        }
        await sleep(1000);
      }
    })();
    return () => void (ended = true);
  }, [state]);

  useEffect(() => {
    if (state === "there") history.replaceState(null, "", chosen ? `#${encodeURIComponent(chosen)}` : " ");
    document.title = chosen ? `${chosen} · latentmem` : "latentmem";
  }, [chosen, state]);
  useEffect(() => {
    const follow = () => setChosen(decodeURIComponent(location.hash.slice(1)));
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);

  if (state === "key") return <KeyForm known={() => setState("loading")} />;
  if (state === "loading")
    return (
      <main class="alone">
        <div class="card" role="status">
          <h1>latentmem</h1>
          <p>The model is being loaded …</p>
          <Problem text={error} />
        </div>
      </main>
    );
  const choose = (id: string) => {
    setChosen(id);
    if (place === "memories") setPlace("chat");
  };
  return (
    <div class={`app at-${place}`}>
      <header>
        <h1>latentmem</h1>
        <span class="quiet">{model}</span>
        <span class="grow" />
        {api.key.get() && (
          <button
            class="small"
            onClick={() => {
              api.key.set("");
              setState("loading");
            }}
          >
            Leave
          </button>
        )}
      </header>
      <nav class="places" aria-label="Parts of the page">
        {PLACES.map(([name, title]) => (
          <button key={name} aria-current={place === name ? "page" : undefined} onClick={() => setPlace(name)}>
            {title}
          </button>
        ))}
      </nav>
      <Memories all={all} chosen={chosen} choose={choose} changed={list} />
      {chosen && all.some((one) => one.id === chosen) ? (
        <One key={chosen} id={chosen} model={model} refused={refused} list={list} choose={choose} />
      ) : (
        <main class="chat">
          <p class="quiet empty">A memory holds what you write into it, and the model answers from it.</p>
          <Problem text={error} />
        </main>
      )}
    </div>
  );
}

/** One memory: the chat, and what is in it. */
function One(props: {
  id: string;
  model: string;
  refused: (error: unknown) => void;
  list: () => Promise<void>;
  choose: (id: string) => void;
}) {
  const { id, model, list, choose } = props;
  const memory = useMemory(id, props.refused);
  const [only, show] = useState<string | null>(null);
  const [asked, setAsked] = useState<"fork" | "delete" | null>(null);
  const { slots, stats, info, version } = memory;
  const work = useWork();
  useEffect(() => void list().catch(() => undefined), [info?.versions, info?.M]);
  const forked = async (name: string) => {
    await list();
    choose(name);
  };
  const place = slots && only !== null ? slots.sources.indexOf(only) : null;
  return (
    <>
      <main class="middle">
        {version !== null && (
          <p class="past row" role="status">
            <span class="grow">You see version {version}, and answers come from it.</span>
            <button class="small" onClick={() => memory.look(null)}>
              Back to the newest
            </button>
          </p>
        )}
        <Chat id={id} model={model} version={version} show={show} refresh={memory.refresh} />
      </main>
      <aside class="side" aria-label={`The memory ${id}`}>
        <div class="memory-part">
          <div class="row">
            <h2 class="grow">{id}</h2>
            <button class="small" disabled={work.busy} onClick={() => void work.run(() => api.save(id))}>
              Export
            </button>
            <button class="small" onClick={() => setAsked("fork")}>
              Fork …
            </button>
            <button class="small danger" onClick={() => setAsked("delete")}>
              Delete …
            </button>
          </div>
          {info && <p class="quiet">{info.versions} versions, {bytes(info.bytes)} on disk</p>}
          <Problem text={memory.error || work.error} />
          {slots && <Pool slots={slots} only={place} />}
          {version === null && <Write id={id} slots={slots} refresh={memory.refresh} />}
          {slots && stats && (
            <Sources
              id={id}
              slots={slots}
              stats={stats}
              only={only}
              show={show}
              past={version !== null}
              refresh={memory.refresh}
            />
          )}
        </div>
        <History
          id={id}
          newest={info ? `${info.versions} ${info.pending} ${info.changed}` : ""}
          version={version}
          look={memory.look}
          refresh={memory.refresh}
          forked={forked}
        />
      </aside>
      {asked === "fork" && <Fork id={id} version={version} forked={forked} onClose={() => setAsked(null)} />}
      {asked === "delete" && (
        <Dialog
          title={`Delete ${id}?`}
          act="Delete it"
          danger
          onAct={async () => {
            await api.remove(id);
            await list();
          }}
          onClose={() => setAsked(null)}
        >
          <p>The memory goes with all its versions and texts, and does not come back. Forks of it stay.</p>
        </Dialog>
      )}
    </>
  );
}
