import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { Chat, type Exchange } from "./Chat";
import { Dialog, Problem } from "./Dialog";
import { Fork, History } from "./History";
import { keepFocus } from "./focus";
import { forgetAll, forgetOf, useKept } from "./kept";
import { KeyForm, Memories } from "./Memories";
import { useMemory } from "./memory";
import { Pool } from "./Pool";
import { kind, plural } from "./pool";
import { bytes, decoded, sleep, useWork, words } from "./util";
import { Sources } from "./Sources";
import { Write } from "./Write";

type Place = "memories" | "chat" | "memory" | "history"; // one of them is seen on a narrow screen
const PLACES: [Place, string][] = [["memories", "Memories"], ["chat", "Chat"], ["memory", "Memory"], ["history", "History"]]; // prettier-ignore
const LOOK = 10_000; // milliseconds, after which one looks for memories that others have made
const MANY = 100; // memories of which one does not look so often

export function App() {
  const [state, setState] = useState<"loading" | "key" | "there">("loading");
  const [model, setModel] = useState("");
  const [writes, setWrites] = useState(false);
  const [all, setAll] = useState<api.MemoryInfo[]>([]);
  const [chosen, setChosen] = useState(() => decoded(location.hash.slice(1)));
  const [place, setPlace] = useState<Place>("chat");
  const [error, setError] = useState("");
  const lists = useRef(0);

  const list = useCallback(async () => {
    const turn = ++lists.current;
    const found = await api.memories();
    if (turn !== lists.current) return; // a newer one is under way
    setAll(found);
    setChosen((now) => now || (found[0]?.id ?? "")); // one that is gone is not silently another one
    setError("");
  }, []);

  const refused = useCallback((failed: unknown) => {
    setError(words(failed));
    if (!(failed instanceof api.Failed)) return;
    if (failed.status === 401) {
      api.key.set("");
      setState("key");
    }
    if (failed.status === 404) list().catch(() => undefined);
    if (failed.status === 503)
      api
        .ready()
        .then((ready) => !ready && setState("loading")) // else it was something else, such as a full disk
        .catch(() => undefined);
  }, []);

  useEffect(() => {
    if (state !== "loading") return;
    let ended = false;
    void (async () => {
      while (!ended) {
        try {
          if (await api.ready()) {
            setModel(await api.model());
            setWrites(await api.writes());
            await list();
            return setState("there");
          }
          setError("");
        } catch (failed) {
          if (ended) return;
          const refused = failed instanceof api.Failed && failed.status === 401;
          setError(refused && !api.key.get() ? "" : words(failed)); // one that has none yet has done nothing wrong
          if (refused) return setState("key");
        }
        await sleep(1000);
      }
    })();
    return () => void (ended = true);
  }, [state]);

  const there = all.some((one) => one.id === chosen);
  useEffect(() => {
    if (state === "there" && chosen && !there) list().catch(refused); // it may have been made since
  }, [chosen, state]);
  const many = all.length > MANY;
  useEffect(() => {
    if (state !== "there" || many) return;
    const timer = setInterval(() => document.hidden || list().catch(refused), LOOK);
    return () => clearInterval(timer);
  }, [state, many]);
  useEffect(() => {
    if (state === "there") history.replaceState(null, "", chosen ? `#${encodeURIComponent(chosen)}` : " ");
    document.title = chosen && state === "there" ? `${chosen} · latentmem` : "latentmem";
  }, [chosen, state]);
  useEffect(keepFocus, []);
  useEffect(() => {
    const follow = (event: HashChangeEvent) => setChosen(decoded(new URL(event.newURL).hash.slice(1)));
    const keep = (event: Event) => event.preventDefault(); // a file that misses its place does not take the page away
    addEventListener("hashchange", follow);
    addEventListener("dragover", keep);
    addEventListener("drop", keep);
    return () => {
      removeEventListener("hashchange", follow);
      removeEventListener("dragover", keep);
      removeEventListener("drop", keep);
    };
  }, []);

  if (state === "key") return <KeyForm known={() => setState("loading")} reason={error} />;
  if (state === "loading")
    return (
      <main class="alone">
        <div class="card" role="status">
          <h1>latentmem</h1>
          <p>{error ? "The server can not be used now; this page tries again." : "The model is being loaded …"}</p>
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
        {!writes && <span class="quiet">This key may read only.</span>}
        {api.key.get() && (
          <button
            class="small"
            onClick={() => {
              lists.current++; // what is on its way was asked for with the key
              api.key.set("");
              forgetAll();
              setChosen("");
              history.replaceState(null, "", " ");
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
      <Memories all={all} chosen={chosen} writes={writes} choose={choose} changed={list} />
      {there ? (
        <One key={chosen} id={chosen} model={model} writes={writes} refused={refused} list={list} choose={choose} />
      ) : (
        <>
          <div class="alarm">
            <Problem text={error || (chosen && `There is no memory ${chosen}, or no longer. Choose another one.`)} />
          </div>
          <main class="middle">
            <p class="quiet empty">A memory holds what you write into it, and the model answers from it.</p>
          </main>
        </>
      )}
    </div>
  );
}

/** One memory: the chat, and what is in it. */
function One(props: {
  id: string;
  model: string;
  writes: boolean;
  refused: (error: unknown) => void;
  list: () => Promise<void>;
  choose: (id: string) => void;
}) {
  const { id, model, writes, list, choose } = props;
  const memory = useMemory(id, props.refused);
  const [only, show] = useState<string | null>(null);
  const [asked, setAsked] = useState<"fork" | "delete" | null>(null);
  const [, setTalk] = useKept<Exchange[]>(`talk ${id}`, []);
  const { slots, stats, info, version } = memory;
  const work = useWork();
  useEffect(() => void list().catch(() => undefined), [info?.versions, info?.M]);
  const forked = async (name: string) => {
    await list();
    choose(name);
  };
  const forgotten = () => {
    // the versions are numbered anew
    memory.look(null);
    setTalk((talk) => talk.map((one) => ({ ...one, behind: { ...one.behind, version: null } })));
  };
  const place = slots && only !== null ? slots.sources.indexOf(only) : -1;
  const waits = version === null && (info?.pending ?? 0) > 0;
  const past = version !== null && (
    <p class="past row" role="status">
      <span class="grow">You see version {version}, and answers come from it.</span>
      <button class="small" onClick={() => memory.look(null)}>
        Back to the newest
      </button>
    </p>
  );
  return (
    <>
      <div class="alarm">
        <Problem text={memory.error || memory.notice} />
      </div>
      <main class="middle">
        {past}
        <Chat
          id={id}
          model={model}
          version={version}
          writes={writes}
          waits={waits}
          show={show}
          refresh={memory.refresh}
        />
      </main>
      <aside class="side" aria-label={`The memory ${id}`}>
        {past && <div class="narrow">{past}</div>}
        <div class="memory-part">
          <div class="row">
            <h2 class="grow" tabIndex={-1}>{id}</h2>
            <button class="small" aria-disabled={work.busy} onClick={() => work.busy || void work.run(() => api.save(id))}>
              Export
            </button>
            <button class="small" hidden={!writes} onClick={() => setAsked("fork")}>
              Fork …
            </button>
            <button class="small danger" hidden={!writes} onClick={() => setAsked("delete")}>
              Delete …
            </button>
          </div>
          {info && <p class="quiet">{kind(info)}</p>}
          {info && <p class="quiet">{plural(info.versions, "version")}, {bytes(info.bytes)} on disk</p>}
          <Problem text={work.error} />
          {slots && <Pool slots={slots} only={place < 0 ? null : place} />}
          <div hidden={version !== null || !writes}>
            <Write id={id} slots={slots} info={info} refresh={memory.refresh} />
          </div>
          {slots && stats && (
            <Sources
              id={id}
              slots={slots}
              stats={stats}
              only={only}
              show={show}
              waits={waits}
              fixed={version !== null || !writes}
              forgotten={forgotten}
              refresh={memory.refresh}
            />
          )}
        </div>
        <History
          id={id}
          newest={info ? `${info.versions} ${info.pending} ${info.changed}` : ""}
          version={version}
          writes={writes}
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
            forgetOf(id);
            choose("");
            await list().catch(props.refused);
          }}
          onClose={() => setAsked(null)}
        >
          <p>The memory goes with all its versions and texts, and does not come back. Forks of it stay.</p>
        </Dialog>
      )}
    </>
  );
}
