import { describe, expect, it } from "vitest";
import { events } from "./api";

async function read(parts: Uint8Array[]): Promise<string[]> {
  const found: string[] = [];
  const body = new ReadableStream<Uint8Array>({
    start(stream) {
      parts.forEach((part) => stream.enqueue(part));
      stream.close();
    },
  });
  for await (const one of events(body)) found.push(one);
  return found;
}

describe("server-sent events", () => {
  const bytes = new TextEncoder().encode('data: {"a":"häß→🦊"}\n\n: a comment\n\ndata: [DONE]\n\n');

  it("come out whole, wherever the connection cuts them", async () => {
    for (const size of [1, 2, 3, 7, 1000]) {
      const parts = Array.from({ length: Math.ceil(bytes.length / size) }, (_, i) => bytes.slice(i * size, (i + 1) * size));
      expect(await read(parts)).toEqual(['{"a":"häß→🦊"}', "[DONE]"]);
    }
  });

  it("leave out one that breaks off", async () => {
    expect(await read([bytes.slice(0, -3)])).toEqual(['{"a":"häß→🦊"}']);
  });
});
