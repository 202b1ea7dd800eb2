import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { useLatest, words } from "./util";

const OFTEN = 200; // milliseconds, while slots change
const SELDOM = 2500; // else: others may write, too
const PATIENT = 5000; // after which a write that does not go on is looked at seldom

export interface Shown {
  slots: api.Slots | null;
  stats: api.Stats | null;
  info: api.MemoryInfo | null;
  error: string;
  /** What became of a version that was looked at. */
  notice: string;
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
  const [notice, setNotice] = useState("");
  const wake = useRef<() => void>(() => undefined);
  const latest = useLatest(refused);

  useEffect(() => {
    let ended = false;
    let wishes = 0; // how often a new look was wished for
    let known = ""; // the state that is shown
    let progress = ""; // of the write that is seen
    let moved = 0; // when it last went on
    let asked = 0; // stats, the newest of which counts
    let wanted: number | null = null; // the version of which they are
    let missing = 0; // since when they failed; they are asked for again, but seldom
    let woken: () => void = () => undefined;
    wake.current = () => {
      wishes++;
      woken();
    };
    setSlots(null);
    setStats(null);

    const failed = (problem: unknown) => {
      if (ended) return;
      latest.current(problem);
      setError(words(problem));
    };

    async function look(): Promise<number> {
      if (document.hidden) return SELDOM;
      const wish = wishes;
      const found = await api.info(id);
      if (ended) return 0;
      setInfo(found);
      const state = JSON.stringify([wish, found.versions, found.changed, found.M, found.pending]);
      const writing = found.pending > 0;
      if (state !== known || (writing && version === null)) {
        const seen = await api.slots(id, version).catch((problem: unknown) => {
          if (version === null || !(problem instanceof api.Failed) || problem.status !== 404) throw problem;
          if (ended) return null;
          setNotice(`There is no version ${version} any more; you see the newest one.`);
          setVersion(null);
          return null;
        });
        if (ended || !seen) return 0;
        setSlots(seen);
        const now = JSON.stringify([seen.version, seen.writing]);
        if (now !== progress) moved = Date.now();
        progress = now;
        // what waits is not waited for: those of the version that is there
        if (state !== known) left(writing ? seen.version : version);
      }
      if (missing && Date.now() - missing >= SELDOM / 2 && state === known) left(wanted);
      known = state;
      if (!missing) setError("");
      return writing && version === null && Date.now() - moved < PATIENT ? OFTEN : SELDOM;
    }

    function left(at: number | null) {
      const turn = ++asked;
      wanted = at;
      api
        .stats(id, at)
        .then((one) => {
          if (ended || turn !== asked) return;
          missing = 0;
          setStats(one);
        })
        .catch((problem: unknown) => {
          if (ended || turn !== asked) return;
          missing = Date.now();
          failed(problem);
        });
    }

    void (async () => {
      while (!ended) {
        let wait = SELDOM;
        const wish = wishes;
        try {
          wait = await look();
        } catch (problem) {
          failed(problem);
        }
        if (ended) return;
        if (wish === wishes)
          await new Promise<void>((done) => {
            const timer = setTimeout(done, wait);
            woken = () => {
              clearTimeout(timer);
              done();
            };
          });
      }
    })();
    const seen = () => !document.hidden && wake.current();
    document.addEventListener("visibilitychange", seen);
    return () => {
      ended = true;
      woken();
      document.removeEventListener("visibilitychange", seen);
    };
  }, [id, version]);

  const refresh = useCallback(() => wake.current(), []);
  const go = useCallback((to: number | null) => {
    setNotice("");
    setVersion(to);
  }, []);
  return { slots, stats, info, error, notice, version, look: go, refresh };
}
