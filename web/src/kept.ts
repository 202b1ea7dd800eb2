import { useState } from "preact/hooks";

// What a person has typed and what was said outlives the parts of the page that show it; a reload clears it.
const kept = new Map<string, unknown>();

/** State that is still there when its part of the page comes back. */
export function useKept<T>(name: string, initial: T): [T, (change: T | ((before: T) => T)) => void] {
  const [, draw] = useState(0);
  const get = () => (kept.has(name) ? (kept.get(name) as T) : initial);
  const set = (change: T | ((before: T) => T)) => {
    kept.set(name, change instanceof Function ? change(get()) : change);
    draw((n) => n + 1);
  };
  return [get(), set];
}

/** Nothing of a memory that was deleted is left for another one of its name. */
export const forgetOf = (id: string) =>
  [...kept.keys()].filter((name) => name.endsWith(` ${id}`)).forEach((name) => kept.delete(name));

export const forgetAll = () => kept.clear();
