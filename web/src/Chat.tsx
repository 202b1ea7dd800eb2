import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { Problem } from "./Dialog";
import { named, percent } from "./pool";
import { Swatch } from "./Pool";
import { useKept } from "./kept";
import { words } from "./util";

export interface Answer {
  text: string;
  state: "waiting" | "running" | "done" | "stopped" | "failed";
  error?: string;
  version?: number | null;
  cut?: boolean;
  empty?: boolean; // there was nothing in the memory
  asked?: api.Message[]; // what it answers
}

export interface Exchange {
  question: string;
  behind: Answer; // with the memory
  plain: Answer | null; // without it
}

const EVERYTHING = 2 ** 30; // tokens: the server leaves out none of the messages that one wants to send along
const WAITING: Answer = { text: "", state: "waiting" };

/** Talk to the model behind a memory, and beside it to the model without one. */
export function Chat(props: {
  id: string;
  model: string;
  version: number | null;
  writes: boolean;
  waits: boolean; // a text is being written, and questions wait for it
  show: (source: string | null) => void;
  refresh: () => void;
}) {
  const { id, model, version } = props;
  const [talk, setTalk] = useKept<Exchange[]>(`talk ${id}`, []);
  const [text, setText] = useKept(`message ${id}`, "");
  const [beside, setBeside] = useKept("beside", true);
  const [keep, setKeep] = useKept(`keep ${id}`, false);
  const [earlier, setEarlier] = useKept("earlier", false);
  const [stop, setStop] = useState<AbortController | null>(null);
  const list = useRef<HTMLDivElement>(null);

  const follows = useRef(true); // the end is seen, unless one has scrolled away from it
  useEffect(() => {
    const box = list.current;
    if (box && stop && follows.current) box.scrollTop = box.scrollHeight;
  }, [talk, stop, props.waits]);
  const top = useRef(0);
  const scrolled = () => {
    const box = list.current!;
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 40) follows.current = true;
    else if (box.scrollTop < top.current) follows.current = false; // more text alone moves nothing up
    top.current = box.scrollTop;
  };
  useEffect(() => () => stop?.abort(), [stop]);

  async function ask(question: string) {
    const abort = new AbortController();
    const place = talk.length;
    follows.current = true;
    setTalk([...talk, { question, behind: { ...WAITING, version }, plain: beside ? WAITING : null }]);
    setText("");
    setStop(abort);
    const change = (which: "behind" | "plain", how: (before: Answer) => Answer) =>
      setTalk((now) => now.map((one, i) => (i === place ? { ...one, [which]: how(one[which] ?? WAITING) } : one)));

    async function answer(which: "behind" | "plain") {
      const before = (earlier ? talk : []).flatMap((one): api.Message[] => {
        const said = one[which];
        if (!said?.text || said.state === "failed") return [];
        return [{ role: "user", content: one.question }, { role: "assistant", content: said.text }];
      });
      const writes = keep && props.writes && version === null;
      const window = earlier ? EVERYTHING : 0;
      const memory = which === "behind" ? { id, version, write: writes ? ("user" as const) : ("none" as const), window } : null;
      try {
        const messages: api.Message[] = [...before, { role: "user", content: question }];
        change(which, (now) => ({ ...now, asked: messages }));
        for await (const piece of api.chat(model, messages, memory, abort.signal))
          change(which, (now) => ({
            ...now,
            text: now.text + piece.text,
            state: "running",
            ...(piece.memory ? { version: piece.memory.version, empty: piece.memory.empty === true } : {}),
            ...(piece.cut ? { cut: true } : {}),
          }));
        change(which, (now) => ({ ...now, state: "done" }));
      } catch (error) {
        change(which, (now) =>
          abort.signal.aborted ? { ...now, state: "stopped" } : { ...now, state: "failed", error: words(error) },
        );
      }
    }

    await Promise.all([answer("behind"), beside ? answer("plain") : null]);
    setStop(null);
    if (keep) props.refresh();
  }

  const idle = !talk.length || stop !== null;
  const submit = (event: Event) => {
    event.preventDefault();
    if (!stop && text.trim()) void ask(text.trim());
  };
  return (
    <section class="chat" aria-labelledby="chat-title">
      <div class="row head">
        <h2 id="chat-title" tabIndex={-1}>
          Chat with {id}
          {version !== null && ` as it was at version ${version}`}
        </h2>
        <button class="small" aria-disabled={idle} onClick={() => idle || setTalk([])}>
          New chat
        </button>
      </div>
      <div
        class="talk"
        ref={list}
        role="log"
        aria-label="Conversation"
        aria-busy={stop !== null}
        tabIndex={0}
        onScroll={scrolled}
      >
        {talk.length === 0 && (
          <p class="quiet empty">
            {props.writes ? "Write something into the memory, then ask about it." : "Ask about what is in the memory."} The same
            model answers twice: with the memory, and without.
          </p>
        )}
        {talk.map((one, i) => (
          <article key={i} class="exchange">
            <p class="question" dir="auto">{one.question}</p>
            <div class="answers">
              <Said {...props} title={`With ${id}`} question={one.question} answer={one.behind} traced />
              {one.plain && <Said {...props} title="Without memory" question={one.question} answer={one.plain} />}
            </div>
          </article>
        ))}
      </div>
      <form class="ask" onSubmit={submit}>
        <label class="grow">
          <span class="unseen">Message</span>
          <textarea
            dir="auto"
            rows={2}
            placeholder="Ask something"
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
            onKeyDown={(event) => {
              if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
            }}
          />
        </label>
        {stop ? (
          <button type="button" onClick={() => stop.abort()}>
            Stop
          </button>
        ) : (
          <button class="primary" aria-disabled={!text.trim()}>
            Send
          </button>
        )}
      </form>
      <div class="row options">
        <label>
          <input type="checkbox" checked={beside} onChange={(event) => setBeside(event.currentTarget.checked)} />
          answer without memory, too
        </label>
        <label>
          <input type="checkbox" checked={earlier} onChange={(event) => setEarlier(event.currentTarget.checked)} />
          send earlier messages along
        </label>
        <label>
          <input
            type="checkbox"
            checked={keep && props.writes && version === null}
            disabled={version !== null || !props.writes}
            onChange={(event) => setKeep(event.currentTarget.checked)}
          />
          write what you say into the memory
        </label>
      </div>
    </section>
  );
}

/** One answer; that of a memory tells what it drew on. */
function Said(props: {
  id: string;
  title: string;
  question: string;
  answer: Answer;
  waits: boolean;
  traced?: boolean;
  show: (source: string | null) => void;
}) {
  const { answer } = props;
  const [shares, setShares] = useState<[string, number][] | null>(null);
  const [passages, setPassages] = useState<api.Passage[]>([]);
  const [known, setKnown] = useState<number | null>(null);
  const [open, setOpen] = useState(false);
  const [error, setError] = useState("");
  const ended = answer.state === "done" || answer.state === "stopped";
  const can = props.traced && ended && answer.text.trim() !== "";
  const toggle = async () => {
    setOpen(!open);
    if (open) props.show(null);
    if (open || shares) return;
    try {
      const asked = answer.asked ?? [{ role: "user", content: props.question }];
      const drawn = await api.drawn(props.id, asked, answer.text.trim(), answer.version ?? null);
      const { sources, passages } = drawn;
      setKnown(drawn.known ?? null);
      setPassages(passages.filter((passage) => passage.text));
      setShares(Object.entries(sources).filter(([, share]) => share >= 0.005).sort((a, b) => b[1] - a[1]));
      setError("");
    } catch (failed) {
      setError(words(failed));
    }
  };
  return (
    <div class={`said ${props.traced ? "behind" : ""}`}>
      <h3>{props.title}</h3>
      <p class="text" dir="auto" onClick={() => can && getSelection()?.isCollapsed && void toggle()}>
        {answer.text.trim() || (ended ? "(nothing)" : "")}
        {(answer.state === "waiting" || answer.state === "running") && (
          <span class="cursor" role="img" aria-label="answering" />
        )}
      </p>
      {props.traced && props.waits && answer.state === "waiting" && (
        <p class="quiet">It answers once what is being written is in the memory.</p>
      )}
      {answer.state === "stopped" && <p class="quiet">stopped</p>}
      {answer.empty && <p class="quiet">The memory is empty: nothing is known yet, the model answers by itself.</p>}
      {answer.cut && <p class="quiet">cut off: an answer is no longer</p>}
      <Problem text={answer.error ?? ""} />
      {can && (
        <button class="small" aria-expanded={open} onClick={() => void toggle()}>
          What it drew on
        </button>
      )}
      {open && (
        <div aria-live="polite">
          <Problem text={error} />
          {!shares && !error && <p class="quiet">Looking …</p>}
          {shares && shares.length > 0 && <p class="quiet">More than another question would, it attended to</p>}
          {known !== null && known < 0.5 && (
            <p class="quiet">This is probably not in the memory ({percent(known)} that it is).</p>
          )}
          {shares?.length === 0 && <p class="quiet">There was nothing in the memory.</p>}
          <ul class="plain shares">
            {shares?.map(([name, share]) => (
              <li
                key={name}
                onMouseEnter={() => props.show(name)}
                onMouseLeave={() => props.show(null)}
              >
                <Swatch id={props.id} source={name} />
                <span class="grow">{named(name)}</span>
                <span class="meter" aria-hidden="true">
                  <span style={{ width: `${100 * share}%` }} />
                </span>
                <span class="share">{percent(share)}</span>
              </li>
            ))}
          </ul>
          {passages.map(({ source, text }) => (
            <blockquote key={source + text} class="passage" dir="auto">
              <p>{text}</p>
              <cite>{named(source)}</cite>
            </blockquote>
          ))}
        </div>
      )}
    </div>
  );
}
