import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { useLatest, words } from "./util";

const OFTEN = 200; // milliseconds, while something is being written
const SELDOM = 2500; // else: others may write, too

export interface Shown {
  slots: api.Slots | null;
  stats: api.Stats | null;
  info: api.MemoryInfo | null;
  error: string;
  /** What the page shows and asks; null: the newest version. */
  version: number | null;
  look: (version: number | null) => void;
  /** Look again, now. */
  refresh: () => void;
}

/** One memory as it is now, or as it was, kept up to date while the page is seen. */
export function useMemory(id: string, refused: (error: unknown) => void): Shown {
  const [slots, setSlots] = useState<api.Slots | null>(null);
  const [stats, setStats] = useState<api.Stats | null>(null);
  const [info, setInfo] = useState<api.MemoryInfo | null>(null);
  const [version, setVersion] = useState<number | null>(null);
  const [error, setError] = useState("");
  const wake = useRef<() => void>(() => undefined);
  const latest = useLatest(refused);

  useEffect(() => {
    let ended = false;
    let known = "";
    const rest = (ms: number) =>
      new Promise<void>((done) => {
        const timer = setTimeout(done, ms);
        wake.current = () => {
          clearTimeout(timer);
          known = "";
          done();
        };
      });

    async function look(): Promise<number> {
      if (document.hidden) return SELDOM;
      const found = await api.info(id);
      const state = JSON.stringify([found.versions, found.changed, found.M]);
      const writing = found.pending > 0;
      if (writing || state !== known) {
        const [seen, left] = await Promise.all([api.slots(id, version), writing ? null : api.stats(id, version)]);
        if (ended) return 0;
        setSlots(seen);
        if (left) setStats(left);
        known = writing ? "" : state;
      }
      if (!ended) {
        setInfo(found);
        setError("");
      }
      return writing ? OFTEN : SELDOM;
    }

    void (async () => {
      while (!ended) {
        let wait = SELDOM;
        try {
          wait = await look();
        } catch (failed) {
          if (ended) return;
          latest.current(failed);
          setError(words(failed));
        }
        if (!ended) await rest(wait);
      }
    })();
    const seen = () => !document.hidden && wake.current();
    document.addEventListener("visibilitychange", seen);
    return () => {
      ended = true;
      wake.current();
      document.removeEventListener("visibilitychange", seen);
    };
  }, [id, version]);

  const refresh = useCallback(() => wake.current(), []);
  return { slots, stats, info, error, version, look: setVersion, refresh };
}
