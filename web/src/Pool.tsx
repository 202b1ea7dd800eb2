import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Slots } from "./api";
import { useKept } from "./kept";
import { ageColour, count, css, described, named, pixels, plural, slotAt, sourceColour, updates, type Colouring } from "./pool";

const ROW = 8; // CSS pixels of a layer

/** The slots of a memory: a row for each layer, oldest on the left; with arrow keys one looks at each of them. */
export function Pool({ slots, only }: { slots: Slots; only: number | null }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [by, setBy] = useKept<Colouring>("colour by", "source");
  const [width, setWidth] = useState(0);
  const [place, setPlace] = useState<[number, number] | null>(null);
  const [near, setNear] = useKept("near", false);
  const places = near && slots.M ? slots.M : slots.N; // that the width of the picture stands for

  useEffect(() => {
    const element = canvas.current!;
    const measure = () => setWidth(Math.round(element.clientWidth * devicePixelRatio));
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    measure();
    return () => observer.disconnect();
  }, []);

  useEffect(() => {
    const element = canvas.current!;
    if (!width) return;
    const frame = requestAnimationFrame(() => {
      const height = Math.round(slots.L * ROW * devicePixelRatio);
      element.width = width;
      element.height = height;
      const rows = new OffscreenCanvas(width, slots.L);
      rows.getContext("2d")!.putImageData(new ImageData(pixels(slots, width, places, by, only), width, slots.L), 0, 0);
      const context = element.getContext("2d")!;
      context.imageSmoothingEnabled = false;
      context.drawImage(rows, 0, 0, width, height);
      const gap = Math.max(1, Math.round(devicePixelRatio));
      for (let layer = 1; layer < slots.L; layer++)
        context.clearRect(0, Math.round((layer * height) / slots.L), width, gap);
      if (place) {
        context.strokeStyle = getComputedStyle(element).color;
        context.lineWidth = 2 * gap;
        const x = ((place[1] + 0.5) * width) / places;
        context.strokeRect(x - 3 * gap, (place[0] * height) / slots.L, 6 * gap, height / slots.L);
      }
    });
    return () => cancelAnimationFrame(frame);
  }, [slots, width, places, by, only, place]);

  const under = (event: PointerEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    const layer = Math.floor(((event.clientY - box.top) / box.height) * slots.L);
    setPlace(within(slots.L, places, layer, Math.floor(((event.clientX - box.left) / box.width) * places)));
  };
  const step = (event: KeyboardEvent) => {
    const far = event.shiftKey ? Math.max(1, Math.round(slots.M / 20)) : 1;
    const moves: Record<string, [number, number]> = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -far], ArrowRight: [0, far], Home: [0, -places], End: [0, places],
    }; // prettier-ignore
    const move = moves[event.key];
    if (event.key === "Escape") setPlace(null);
    if (!move || !slots.M) return;
    event.preventDefault();
    setPlace(place ? within(slots.L, places, place[0] + move[0], place[1] + move[1]) : [0, slots.M - 1]);
  };

  useMemo(() => slots.sources.forEach((source) => sourceColour(slots.id, source)), [slots]); // oldest first
  const summary = useMemo(() => described(slots), [slots]);
  const there = place && slotAt(slots, ...place);
  const [oldest, newest] = updates(slots);
  return (
    <figure class="pool">
      <div class="row">
        <span class="quiet grow">Layers from top to bottom, slots from old to new</span>
        {slots.M > 0 && slots.M < slots.N && (
          <button class="small" aria-pressed={near} onClick={() => setNear(!near)}>
            Zoom in
          </button>
        )}
        <fieldset class="choice">
          <legend class="unseen">Colour by</legend>
          {(["source", "age"] as const).map((one) => (
            <label key={one}>
              <input type="radio" name="colouring" checked={by === one} onChange={() => setBy(one)} />
              {one}
            </label>
          ))}
        </fieldset>
      </div>
      <div
        class="slots"
        role="application"
        aria-label="Slots, one by one with the arrow keys"
        aria-describedby="pool-place"
        tabIndex={0}
        onPointerMove={under}
        onPointerDown={under}
        onPointerLeave={(event) => event.pointerType === "mouse" && setPlace(null)}
        onBlur={() => setPlace(null)}
        onKeyDown={step}
      >
        <canvas ref={canvas} style={{ height: `${slots.L * ROW}px` }} role="img" aria-label={summary} />
      </div>
      <figcaption>
        <p id="pool-place" aria-live={place ? "polite" : "off"} class="place">
          {place && there
            ? `Layer ${place[0] + 1}, slot ${count(place[1] + 1)}: ${named(slots.sources[there.source])}, ` +
              `${age(newest - there.update)}`
            : place
              ? `Layer ${place[0] + 1}, place ${count(place[1] + 1)}: empty`
              : summary}
        </p>
        {by === "age" && slots.M > 0 && (
          <p class="ages">
            {age(newest - oldest)}
            <span aria-hidden="true" style={{ background: `linear-gradient(90deg, ${AGES})` }} />
            newest
          </p>
        )}
      </figcaption>
    </figure>
  );
}

const AGES = [0, 0.25, 0.5, 0.75, 1].map((share) => css(ageColour(share))).join(", ");
const age = (ago: number) => (ago <= 0 ? "written by the last update" : `${plural(ago, "update")} ago`);

function within(L: number, places: number, layer: number, place: number): [number, number] {
  const clamp = (n: number, most: number) => Math.max(0, Math.min(most - 1, n));
  return [clamp(layer, L), clamp(place, places)];
}

/** The colour of a source, beside its name. */
export const Swatch = ({ id, source }: { id: string; source: string }) => (
  <span class="swatch" aria-hidden="true" style={{ background: css(sourceColour(id, source)) }} />
);
