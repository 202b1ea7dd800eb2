import { describe, expect, it, vi } from "vitest";
import { chat, events } from "./api";

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

describe("an answer", () => {
  const ask = async (body: ReadableStream<Uint8Array>) => {
    vi.stubGlobal("sessionStorage", { getItem: () => null });
    vi.stubGlobal("fetch", () => Promise.resolve(new Response(body)));
    const said: string[] = [];
    try {
      for await (const piece of chat("m", [], null, new AbortController().signal)) said.push(piece.text);
    } catch (error) {
      said.push((error as Error).message);
    }
    return said;
  };
  const piece = new TextEncoder().encode('data: {"choices":[{"delta":{"content":"yes"}}]}\n\n');

  it("says in words of ours that the connection broke off, however it did", async () => {
    for (const end of ["close", "error"] as const) {
      let sent = false;
      const body = new ReadableStream<Uint8Array>({
        pull(stream) {
          if (!sent) stream.enqueue(piece);
          else if (end === "close") stream.close();
          else stream.error(new TypeError("network error"));
          sent = true;
        },
      });
      expect(await ask(body)).toEqual(["yes", "The connection broke off."]);
    }
  });
});
