import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { Dialog, Problem } from "./Dialog";
import { Name } from "./Memories";
import { named, plural } from "./pool";
import { date, useWork, words } from "./util";

/** The versions of a memory, newest first: look at them, go back to them, go on from them elsewhere. */
export function History(props: {
  id: string;
  newest: string; // changes whenever there is something new
  version: number | null;
  writes: boolean;
  look: (version: number | null) => void;
  refresh: () => void;
  forked: (id: string) => Promise<void>;
}) {
  const { id, newest, version, look } = props;
  const [lines, setLines] = useState<api.HistoryLine[]>([]);
  const [more, setMore] = useState(false);
  const [error, setError] = useState("");
  const [forking, setForking] = useState<number | null>(null);
  const [back, setBack] = useState<number | null>(null);
  const work = useWork();
  const known = useRef(0);
  known.current = lines.length;

  useEffect(() => {
    let ended = false;
    api
      .history(id, null, Math.min(100, Math.max(20, known.current)))
      .then((page) => {
        if (ended) return;
        setLines(page.data);
        setMore(page.has_more);
        setError("");
      })
      .catch((failed) => !ended && setError(words(failed)));
    return () => void (ended = true);
  }, [id, newest]);

  const older = () =>
    work.run(async () => {
      const page = await api.history(id, lines.at(-1)?.version ?? null);
      const before = lines.at(-1)?.version;
      setLines((now) => (now.at(-1)?.version === before ? [...now, ...page.data] : now));
      setMore(page.has_more);
    });
  const top = lines[0]?.version;
  return (
    <section class="history" aria-labelledby="history-title">
      <h3 id="history-title" tabIndex={-1}>History</h3>
      <Problem text={error || work.error} />
      <ol class="plain" reversed>
        {lines.map((line) => {
          const seen = version === null ? line.version === top : line.version === version;
          const { pruned } = line; // its slots are gone; a write that failed still says so
          return (
            <li key={`${line.version} ${line.time}`} class={seen ? "seen" : ""} aria-current={seen ? "true" : undefined}>
              <span class="number">{line.version}</span>
              <div class="grow">
                <span>{event(line)}</span> <time class="quiet" dateTime={line.time}>{date(line.time)}</time>
                {line.state !== "applied" && <span class="state"> {line.state}{line.error && `: ${line.error}`}</span>}
                {line.tokens > 0 && <What id={id} line={line} />}
              </div>
              <span class="row end">
                <button
                  class="small"
                  hidden={pruned}
                  aria-pressed={seen}
                  onClick={() => look(seen || line.version === top ? null : line.version)}
                >
                  Look
                </button>
                {line.version !== top && props.writes && !pruned && (
                  <button class="small" onClick={() => setBack(line.version)}>
                    Go back …
                  </button>
                )}
                <button class="small" hidden={!props.writes || pruned} onClick={() => setForking(line.version)}>
                  Fork …
                </button>
              </span>
            </li>
          );
        })}
      </ol>
      {more && (
        <button class="small" aria-disabled={work.busy} onClick={() => work.busy || void older()}>
          Older ones
        </button>
      )}
      {back !== null && (
        <Dialog
          title={`Go back to version ${back}?`}
          act="Go back"
          onAct={async () => {
            await api.rollback(id, back);
            look(null);
            props.refresh();
          }}
          onClose={() => setBack(null)}
        >
          <p>That is a new version, so nothing is lost: you can go back to today's, too.</p>
        </Dialog>
      )}
      {forking !== null && <Fork {...props} version={forking} onClose={() => setForking(null)} />}
    </section>
  );
}

export function Fork({ id, version, forked, onClose }: { id: string; version: number | null; forked: (id: string) => Promise<void>; onClose: () => void }) {
  const [name, setName] = useState(`${id.slice(0, 62)}-2`);
  const act = async () => {
    await api.fork(id, name, version);
    await forked(name);
  };
  return (
    <Dialog title={version === null ? `Fork ${id}` : `Fork ${id} at version ${version}`} act="Fork" onAct={act} onClose={onClose}>
      <p>A memory of its own that goes on from here.</p>
      <Name value={name} set={setName} />
    </Dialog>
  );
}

/** What was written, read from the server when somebody wants to see it. */
function What({ id, line }: { id: string; line: api.HistoryLine }) {
  const [text, setText] = useState<string | null>(null);
  const [error, setError] = useState("");
  const open = async (event: Event) => {
    if (!(event.currentTarget as HTMLDetailsElement).open || text !== null) return;
    try {
      const found = (await api.history(id, line.version + 1, 1, true)).data[0]?.text ?? null;
      if (found === null) setText("This store keeps no texts.");
      else if (typeof found === "string") setText(found);
      else setText(found.map((one) => (typeof one === "number" ? String(one) : `${one.role}: ${one.content}`)).join("\n"));
    } catch (failed) {
      setError(words(failed));
    }
  };
  return (
    <details onToggle={open}>
      <summary>{plural(line.tokens, "token")}</summary>
      <Problem text={error} />
      {text !== null && <pre dir="auto">{text}</pre>}
    </details>
  );
}

function event(line: api.HistoryLine): string {
  const of = line.source !== null ? ` ${named(line.source)}` : "";
  const from = line.base ? ` ${line.base.version}` : "";
  const said: Record<string, string> = {
    create: "made",
    write: `written:${of}`,
    forget: `forgotten:${of}`,
    expire: `expired:${of}`,
    pin: `pinned:${of}`,
    unpin: `pin taken off:${of}`,
    rollback: `back to version${from}`,
    fork: line.base ? `forked from ${line.base.id} at version${from}` : "forked",
    import: "imported",
  };
  return said[line.event] ?? `${line.event}${of}`;
}
