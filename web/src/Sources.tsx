import { useState } from "preact/hooks";
import * as api from "./api";
import { Dialog, Problem } from "./Dialog";
import { count, named, percent, plural } from "./pool";
import { Swatch } from "./Pool";
import { date, useWork } from "./util";

/** What was written: how much of it is left and will be, and what can be done about that. */
export function Sources(props: {
  id: string;
  slots: api.Slots;
  stats: api.Stats;
  only: string | null;
  show: (source: string | null) => void;
  waits: boolean; // what is asked for comes after a write
  fixed: boolean; // it can not be changed: an older version, or a key that may only read
  forgotten: () => void; // as if it had never been written
  refresh: () => void;
}) {
  const { id, slots, stats, refresh } = props;
  const [forgetting, setForgetting] = useState<string | null>(null);
  const [expiring, setExpiring] = useState<api.Source | null>(null);
  const work = useWork();
  const pin = (one: api.Source) =>
    work.run(async () => {
      await api.pin(id, one.source, !one.pinned);
      refresh();
    });
  const ahead = Object.keys(stats.sources[0]?.forecast ?? {});
  return (
    <section class="sources" aria-labelledby="sources-title">
      <h3 id="sources-title" tabIndex={-1}>What is in it</h3>
      <p class="quiet">
        {stats.half_life
          ? `Once it is full, half of a text is left after ${count(Math.round(stats.half_life))} updates of ${plural(slots.K, "slot")}.`
          : "One update replaces all of it."}
        {slots.R > 0 && ` Its long-term memory holds ${count(slots.stored)} slots; a question takes back up to ${count(slots.R)} of them.`}
      </p>
      <Problem text={work.error} />
      {work.busy && props.waits && (
        <p class="quiet" role="status">
          It is done once what is being written is in the memory.
        </p>
      )}
      {stats.sources.length === 0 && <p class="quiet">Nothing yet.</p>}
      <ul class="plain">
        {[...stats.sources].reverse().map((one) => (
          <li key={one.source} class={`source ${props.only === one.source ? "shown" : ""}`}>
            <button
              class="name"
              aria-pressed={props.only === one.source}
              title="Show only this one in the picture"
              onClick={() => props.show(props.only === one.source ? null : one.source)}
            >
              <Swatch id={id} source={one.source} />
              {named(one.source)}
            </button>
            <span class="quiet">{plural(one.tokens, "token")}</span>
            <span class="meter" role="img" aria-label={`${percent(one.left)} left`}>
              <span style={{ width: `${100 * one.left}%` }} />
            </span>
            <dl>
              <div>
                <dt>left</dt>
                <dd>{percent(one.left)}</dd>
              </div>
              {slots.R > 0 && (
                <div>
                  <dt>long-term</dt>
                  <dd>{percent(one.stored)}</dd>
                </div>
              )}
              {ahead.map((n) => (
                <div key={n}>
                  <dt>{n === "1" ? "after 1 update" : `after ${n}`}</dt>
                  <dd>{percent(one.forecast[n]!)}</dd>
                </div>
              ))}
            </dl>
            {one.expires && <span class="quiet">expires {date(one.expires)}</span>}
            <span class="row end" hidden={props.fixed}>
              <button
                class="small"
                aria-pressed={one.pinned}
                aria-disabled={work.busy}
                onClick={() => work.busy || void pin(one)}
              >
                {one.pinned ? "Pinned" : "Pin"}
              </button>
              <button class="small" onClick={() => setExpiring(one)}>
                Expire …
              </button>
              <button class="small" onClick={() => setForgetting(one.source)}>
                Forget …
              </button>
            </span>
          </li>
        ))}
      </ul>
      {forgetting !== null && <Forget {...props} source={forgetting} onClose={() => setForgetting(null)} />}
      {expiring && <Expire {...props} one={expiring} onClose={() => setExpiring(null)} />}
    </section>
  );
}

function Forget(props: {
  id: string;
  source: string;
  refresh: () => void;
  forgotten: () => void;
  onClose: () => void;
}) {
  const { id, source, refresh, onClose } = props;
  const [exact, setExact] = useState(false);
  const act = async () => {
    await api.forget(id, source, exact);
    if (exact) props.forgotten();
    refresh();
  };
  return (
    <Dialog title={`Forget ${named(source)}?`} act="Forget it" danger onAct={act} onClose={onClose}>
      <label class="option">
        <input type="radio" name="how" checked={!exact} onChange={() => setExact(false)} />
        <span>
          <b>Drop its slots.</b> At once, and older versions keep them. What was written after it has read it, so traces
          can be left.
        </span>
      </label>
      <label class="option">
        <input type="radio" name="how" checked={exact} onChange={() => setExact(true)} />
        <span>
          <b>As if it had never been written.</b> Everything written since is written anew, in every version and every
          fork. It can not be undone, and takes as long as writing did.
        </span>
      </label>
    </Dialog>
  );
}

const AFTER: [string, number | null][] = [["never", null], ["in an hour", 3600], ["in a day", 86400], ["in a week", 604800], ["in 30 days", 2592000]]; // prettier-ignore

function Expire({ id, one, refresh, onClose }: { id: string; one: api.Source; refresh: () => void; onClose: () => void }) {
  const [chosen, setChosen] = useState(2);
  const act = async () => {
    await api.expire(id, one.source, AFTER[chosen]![1]);
    refresh();
  };
  return (
    <Dialog title={`When should ${named(one.source)} expire?`} act="Set" onAct={act} onClose={onClose}>
      <p>Its slots are dropped then, as if you had forgotten it.</p>
      <label>
        Expires
        <select value={chosen} onChange={(event) => setChosen(Number(event.currentTarget.value))}>
          {AFTER.map(([name], i) => (
            <option key={name} value={i}>
              {name}
            </option>
          ))}
        </select>
      </label>
    </Dialog>
  );
}
