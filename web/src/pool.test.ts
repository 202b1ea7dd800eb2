import { describe, expect, it } from "vitest";
import type { Slots } from "./api";
import { ageColour, described, kind, named, pixels, plural, slotAt, sourceColour, updates } from "./pool";

const made = (more: Partial<Slots> = {}): Slots => ({
  id: "a", version: 3, L: 2, M: 6, N: 8, K: 4, R: 0, updates: 5, stored: 0, sources: ["x", "y"],
  layers: [[0, 1, 2, 1, 5, 4], [-1, 0, 1, 0, 1, 1, 1, 5, 4]], writing: null, ...more,
}); // prettier-ignore

const colours = (data: Uint8ClampedArray, width: number, row: number) =>
  Array.from({ length: width }, (_, x) => Array.from(data.slice((row * width + x) * 4, (row * width + x) * 4 + 4)));

describe("the picture", () => {
  it("shows the source of every slot, and nothing where there is none", () => {
    const data = pixels(made(), 8, 8, "source", null);
    const [x, y, old] = ["x", "y", undefined].map((name) => [...sourceColour("a", name), 255]);
    const none = [0, 0, 0, 0];
    expect(colours(data, 8, 0)).toEqual([x, x, y, y, y, y, none, none]);
    expect(colours(data, 8, 1)).toEqual([old, x, y, y, y, y, none, none]);
  });

  it("keeps the colours of sources when one of them is forgotten", () => {
    const [x, y] = ["x", "y"].map((name) => sourceColour("a", name));
    expect(x).not.toEqual(y);
    const row = colours(pixels(made({ sources: ["y"], M: 4, layers: [[0, 5, 4]] }), 8, 8, "source", null), 8, 0);
    expect(row[0]).toEqual([...y!, 255]);
  });

  it("gives the sources of each memory ten colours, whatever others hold", () => {
    const ten = (id: string) => new Set("abcdefghij".split("").map((name) => sourceColour(id, name).join()));
    expect([ten("one").size, ten("two").size]).toEqual([10, 10]);
  });

  it("is as wide as it is told to be, and each column shows its first slot", () => {
    const wide = colours(pixels(made(), 16, 8, "source", null), 16, 0);
    const right = colours(pixels(made(), 8, 8, "source", null), 8, 0);
    expect(wide).toEqual(right.flatMap((one) => [one, one]));
    const narrow = colours(pixels(made(), 4, 8, "source", null), 4, 0);
    expect(narrow).toEqual([0, 2, 4, 6].map((i) => right[i]));
  });

  it("shows the filled part alone when looked at from near", () => {
    const data = colours(pixels(made(), 6, 6, "source", null), 6, 0);
    expect(data.every((one) => one[3] === 255)).toBe(true);
  });

  it("colours the oldest update darkest and the newest brightest", () => {
    const row = colours(pixels(made(), 8, 8, "age", null), 8, 1);
    expect(row[0]!.slice(0, 3)).toEqual(ageColour(0));
    expect(row[1]!.slice(0, 3)).toEqual(ageColour(0.2));
    expect(row[2]!.slice(0, 3)).toEqual(ageColour(1));
  });

  it("dims all sources but one", () => {
    const row = colours(pixels(made(), 8, 8, "source", 1), 8, 0);
    expect(row.map((one) => one[3])).toEqual([40, 40, 255, 255, 255, 255, 0, 0]);
  });

  it("agrees with looking at each place, however the slots lie", () => {
    let seed = 7;
    const random = (n: number) => (seed = (seed * 48271) % 2147483647) % n;
    const layers = Array.from({ length: 3 }, () => Array.from({ length: 90 }, (_, i) => (i % 3 === 2 ? 1 + random(7) : random(12)))); // prettier-ignore
    const slots = made({ L: 3, M: 100, N: 400, layers, sources: "abcdefghijkl".split("") });
    for (const width of [1, 37, 400, 555]) {
      const data = pixels(slots, width, 400, "source", null);
      for (let layer = 0; layer < 3; layer++)
        colours(data, width, layer).forEach((one, x) => {
          const there = slotAt(slots, layer, Math.floor((x * 400) / width));
          expect(one).toEqual(there ? [...sourceColour("a", slots.sources[there.source]), 255] : [0, 0, 0, 0]);
        });
    }
  });
});

describe("in words", () => {
  it("finds what stands at a place", () => {
    expect(slotAt(made(), 1, 0)).toEqual({ source: -1, update: 0 });
    expect(slotAt(made(), 1, 1)).toEqual({ source: 0, update: 1 });
    expect(slotAt(made(), 0, 5)).toEqual({ source: 1, update: 5 });
    expect(slotAt(made(), 0, 6)).toBeNull();
    expect(slotAt(made(), 9, 0)).toBeNull();
  });

  it("says how full it is and of what", () => {
    expect(described(made())).toBe("2 layers with 6 of 8 slots each; of these 67% y, 25% x.");
    expect(described(made({ M: 0, layers: [[], []] }))).toBe("An empty memory of 2 layers with room for 8 slots each.");
  });

  it("says in one line what a memory is", () => {
    expect(kind({ form: "coded", N: 1536, longterm: { R: 512 } })).toBe("coded, 1,536 slots, 512 searched");
    expect(kind({ form: "exact", N: 2048, longterm: null })).toBe("exact, 2,048 slots, what is dropped is lost");
    expect(kind({ form: null, N: 1, longterm: null })).toBe("1 slot");
  });

  it("counts one and many, and keeps names that turn text round to themselves", () => {
    expect([plural(1, "token"), plural(1200, "token")]).toEqual(["1 token", "1,200 tokens"]);
    expect([named("diary"), named("Äpfel 日本"), named("")]).toEqual(["diary", "Äpfel 日本", "older than this memory"]);
    expect([named("שלום"), named("\u202egnp\u2069.exe")]).toEqual(["\u2068שלום\u2069", "\u2068\u202egnp.exe\u2069"]);
  });

  it("knows the oldest update that is left", () => {
    expect(updates(made())).toEqual([0, 5]);
    expect(updates(made({ layers: [[], []] }))).toEqual([5, 5]);
  });
});
