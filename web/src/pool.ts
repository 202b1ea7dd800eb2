// The pool as a picture: a row of pixels for each layer, a colour for each slot's source or age.

import type { MemoryInfo, Slots } from "./api";

export type Colouring = "source" | "age";
export type Colour = [number, number, number];

// Ten that differ in lightness, too, so that neighbours can be told apart without seeing hues.
const SOURCES: Colour[] = [
  [66, 120, 206], [232, 146, 52], [46, 155, 105], [190, 75, 140], [128, 104, 204],
  [205, 180, 45], [40, 160, 190], [214, 88, 72], [125, 150, 60], [150, 115, 90],
]; // prettier-ignore
const OLDER: Colour = [140, 140, 148];
const AGES: Colour[] = [[62, 38, 110], [52, 96, 150], [38, 148, 138], [120, 196, 88], [246, 220, 70]]; // old to new

const seen = new Map<string, Map<string, number>>(); // the sources of each memory, numbered as they were met

/** The colour of a memory's source, which it keeps as long as the page is open; none is what is older than the memory. */
export function sourceColour(id: string, source: string | undefined): Colour {
  if (!source) return OLDER;
  const met = seen.get(id) ?? new Map<string, number>();
  if (!met.size) seen.set(id, met);
  if (!met.has(source)) met.set(source, met.size);
  return SOURCES[met.get(source)! % SOURCES.length]!;
}

/** The colour of an update by how old it is: 0 is the first one, 1 the last one. */
export function ageColour(share: number): Colour {
  const place = Math.min(1, Math.max(0, share)) * (AGES.length - 1);
  const below = Math.min(Math.floor(place), AGES.length - 2);
  const [a, b, f] = [AGES[below]!, AGES[below + 1]!, place - below];
  return [0, 1, 2].map((i) => Math.round(a[i]! + (b[i]! - a[i]!) * f)) as Colour;
}

export const css = ([r, g, b]: Colour) => `rgb(${r} ${g} ${b})`;

/** The oldest update that still has a slot, and the number of the last one. */
export function updates(slots: Slots): [number, number] {
  let oldest = slots.updates;
  for (const runs of slots.layers) if (runs.length) oldest = Math.min(oldest, runs[1]!);
  return [oldest, slots.updates];
}

/**
 * RGBA of `width` columns and L rows; a column stands for places / width slots and shows the first of them. Places
 * that hold nothing stay transparent, and so nearly do slots of other sources than `only`.
 */
export function pixels(
  slots: Slots,
  width: number,
  places: number,
  by: Colouring,
  only: number | null,
): Uint8ClampedArray<ArrayBuffer> {
  const out = new Uint8ClampedArray(width * slots.L * 4);
  const [oldest, newest] = updates(slots);
  const span = Math.max(1, newest - oldest);
  const colours = slots.sources.map((source) => sourceColour(slots.id, source));
  slots.layers.forEach((runs, layer) => {
    let end = 0;
    for (let i = 0; i < runs.length; i += 3) {
      const [source, update, count] = [runs[i]!, runs[i + 1]!, runs[i + 2]!];
      const from = Math.ceil((end * width) / places);
      end += count;
      const to = Math.ceil((end * width) / places);
      if (to === from) continue; // narrower than a column, and not the first in one
      const [r, g, b] = by === "source" ? (colours[source] ?? OLDER) : ageColour((update - oldest) / span);
      const alpha = only === null || only === source ? 255 : 40;
      for (let x = from, at = (layer * width + from) * 4; x < to; x++, at += 4) {
        out[at] = r;
        out[at + 1] = g;
        out[at + 2] = b;
        out[at + 3] = alpha;
      }
    }
  });
  return out;
}

/** What stands at a place of a layer; null where there is nothing. */
export function slotAt(slots: Slots, layer: number, place: number): { source: number; update: number } | null {
  const runs = slots.layers[layer] ?? [];
  let end = 0;
  for (let i = 0; i < runs.length; i += 3) {
    end += runs[i + 2]!;
    if (place < end) return { source: runs[i]!, update: runs[i + 1]! };
  }
  return null;
}

const TURNS = /[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefc]/; // the direction of text

/** The name under which a source is shown; one that is read from right to left turns nothing round that is beside it. */
export function named(source: string | undefined): string {
  if (!source) return "older than this memory";
  return TURNS.test(source) ? `\u2068${source.replace(/[\u2066-\u2069]/g, "")}\u2069` : source;
}

/** What a person who does not see the picture is told. */
export function described(slots: Slots): string {
  if (slots.M === 0) return `An empty memory of ${plural(slots.L, "layer")} with room for ${count(slots.N)} slots each.`;
  const left = slots.sources.map(() => 0);
  for (const runs of slots.layers)
    for (let i = 0; i < runs.length; i += 3) if (runs[i]! >= 0) left[runs[i]!]! += runs[i + 2]!;
  const most = left
    .map((sum, i) => ({ name: named(slots.sources[i]), share: sum / (slots.L * slots.M) }))
    .filter((one) => one.share > 0)
    .sort((a, b) => b.share - a.share)
    .slice(0, 3)
    .map((one) => `${percent(one.share)} ${one.name}`);
  const filled = `${plural(slots.L, "layer")} with ${count(slots.M)} of ${count(slots.N)} slots each`;
  return `${filled}; of these ${most.join(", ")}.`;
}

/** What a memory is, in one line; an older version of it does not say its form. */
export function kind({ form, N, longterm }: Pick<MemoryInfo, "form" | "N" | "longterm">): string {
  if (!form) return plural(N, "slot");
  return `${form}, ${plural(N, "slot")}, ${longterm ? `${count(longterm.R)} searched` : "what is dropped is lost"}`;
}

export const count = (n: number) => n.toLocaleString("en");
export const plural = (n: number, what: string) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;
export const percent = (share: number) => (share > 0 && share < 0.005 ? "<1%" : `${Math.round(share * 100)}%`);
