import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { Problem } from "./Dialog";
import { named, percent } from "./pool";
import { Swatch } from "./Pool";
import { words } from "./util";

interface Answer {
  text: string;
  state: "waiting" | "running" | "done" | "stopped" | "failed";
  error?: string;
  version?: number | null;
  cut?: boolean;
}

interface Exchange {
  question: string;
  behind: Answer; // with the memory
  plain: Answer | null; // without it
}

const WAITING: Answer = { text: "", state: "waiting" };

/** Talk to the model behind a memory, and beside it to the model without one. */
export function Chat(props: {
  id: string;
  model: string;
  version: number | null;
  show: (source: string | null) => void;
  refresh: () => void;
}) {
  const { id, model, version } = props;
  const [talk, setTalk] = useState<Exchange[]>([]);
  const [text, setText] = useState("");
  const [beside, setBeside] = useState(true);
  const [keep, setKeep] = useState(false);
  const [earlier, setEarlier] = useState(false);
  const [stop, setStop] = useState<AbortController | null>(null);
  const list = useRef<HTMLDivElement>(null);

  useEffect(() => {
    const end = list.current?.lastElementChild;
    if (stop) end?.scrollIntoView({ block: "end" });
  }, [talk, stop]);
  useEffect(() => () => stop?.abort(), [stop]);

  async function ask(question: string) {
    const abort = new AbortController();
    const place = talk.length;
    setTalk([...talk, { question, behind: WAITING, plain: beside ? WAITING : null }]);
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
      const memory = which === "behind" ? { id, version, write: keep && version === null } : null;
      try {
        const messages: api.Message[] = [...before, { role: "user", content: question }];
        for await (const piece of api.chat(model, messages, memory, abort.signal))
          change(which, (now) => ({
            ...now,
            text: now.text + piece.text,
            state: "running",
            ...(piece.memory ? { version: piece.memory.version } : {}),
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

  const submit = (event: Event) => {
    event.preventDefault();
    if (!stop && text.trim()) void ask(text.trim());
  };
  return (
    <section class="chat" aria-labelledby="chat-title">
      <div class="row head">
        <h2 id="chat-title">
          Chat with {id}
          {version !== null && ` as it was at version ${version}`}
        </h2>
        <button class="small" disabled={!talk.length || stop !== null} onClick={() => setTalk([])}>
          New chat
        </button>
      </div>
      <div class="talk" ref={list} role="log" aria-label="Conversation" tabIndex={0}>
        {talk.length === 0 && (
          <p class="quiet empty">
            Write something into the memory, then ask about it. The same model answers twice: with the memory, and
            without.
          </p>
        )}
        {talk.map((one, i) => (
          <article key={i} class="exchange">
            <p class="question">{one.question}</p>
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
          <button class="primary" disabled={!text.trim()}>
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
            checked={keep && version === null}
            disabled={version !== null}
            onChange={(event) => setKeep(event.currentTarget.checked)}
          />
          write what is said into the memory
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
  traced?: boolean;
  show: (source: string | null) => void;
}) {
  const { answer } = props;
  const [shares, setShares] = useState<[string, number][] | null>(null);
  const [open, setOpen] = useState(false);
  const [error, setError] = useState("");
  const ended = answer.state === "done" || answer.state === "stopped";
  const can = props.traced && ended && answer.text.trim() !== "";
  const toggle = async () => {
    setOpen(!open);
    if (open) props.show(null);
    if (open || shares) return;
    try {
      const { sources } = await api.drawn(props.id, props.question, answer.text.trim(), answer.version ?? null);
      setShares(Object.entries(sources).filter(([, share]) => share >= 0.005).sort((a, b) => b[1] - a[1]));
      setError("");
    } catch (failed) {
      setError(words(failed));
    }
  };
  return (
    <div class={`said ${props.traced ? "behind" : ""}`}>
      <h3>{props.title}</h3>
      <p class="text" onClick={() => can && void toggle()}>
        {answer.text.trim() || (answer.state === "waiting" || answer.state === "running" ? "" : "(nothing)")}
        {(answer.state === "waiting" || answer.state === "running") && <span class="cursor" aria-label="answering" />}
      </p>
      {answer.state === "stopped" && <p class="quiet">stopped</p>}
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
          {shares && shares.length > 0 && <p class="quiet">Of its attention to the memory went to</p>}
          {shares?.length === 0 && <p class="quiet">There was nothing in the memory.</p>}
          <ul class="plain shares">
            {shares?.map(([name, share]) => (
              <li
                key={name}
                onMouseEnter={() => props.show(name)}
                onMouseLeave={() => props.show(null)}
              >
                <Swatch source={name} />
                <span class="grow">{named(name)}</span>
                <span class="meter" aria-hidden="true">
                  <span style={{ width: `${100 * share}%` }} />
                </span>
                <span>{percent(share)}</span>
              </li>
            ))}
          </ul>
        </div>
      )}
    </div>
  );
}
