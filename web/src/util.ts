import { useEffect, useRef, useState } from "preact/hooks";

/** What an error says to a person. */
export const words = (error: unknown) => (error instanceof Error ? error.message : String(error));

/** Something that takes a while: whether it runs, how it failed, and how to begin it. */
export function useWork(): { busy: boolean; error: string; run: (work: () => Promise<void>) => Promise<boolean>; clear: () => void } {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState("");
  const run = async (work: () => Promise<void>) => {
    setBusy(true);
    setError("");
    try {
      await work();
      return true;
    } catch (failed) {
      setError(words(failed));
      return false;
    } finally {
      setBusy(false);
    }
  };
  return { busy, error, run, clear: () => setError("") };
}

/** The newest value, for callbacks that outlive a drawing. */
export function useLatest<T>(value: T): { current: T } {
  const latest = useRef(value);
  useEffect(() => {
    latest.current = value;
  });
  return latest;
}

export const sleep = (ms: number) => new Promise((done) => setTimeout(done, ms));

const DATE = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });
export const date = (iso: string) => DATE.format(new Date(iso));

export function bytes(n: number): string {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) [n, unit] = [n / 1000, unit + 1];
  return `${n < 10 && unit ? n.toFixed(1) : Math.round(n)} ${units[unit]}`;
}
