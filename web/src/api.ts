// What the server says: its answers as types, and one function for each address. docs/how-to/serve.md shows them.

export interface MemoryInfo {
  id: string;
  versions: number;
  pending: number;
  changed: string;
  bytes: number;
  M: number;
  N: number;
  model: string;
  form: string | null;
  longterm: { R: number } | null;
}

export interface Slots {
  id: string;
  version: number;
  L: number;
  M: number;
  N: number;
  K: number;
  R: number;
  updates: number;
  stored: number;
  sources: string[];
  layers: number[][]; // of each layer runs of (source, update, slots), oldest first
  writing: { done: number; total: number } | null;
}

export interface Source {
  source: string;
  tokens: number;
  slots: number;
  left: number;
  stored: number;
  pinned: boolean;
  expires: string | null;
  forecast: Record<string, number>;
}

export interface Stats {
  version: number;
  half_life: number | null;
  sources: Source[];
}

export interface HistoryLine {
  version: number;
  event: string;
  source: string | null;
  tokens: number;
  base: { id: string; version: number } | null;
  state: string;
  pruned: boolean;
  error: string | null;
  M: number | null;
  N: number | null;
  time: string;
  text: string | { role: string; content: string }[] | number[] | null;
}

export interface Written {
  version: number | null;
  state: "applied" | "pending";
}

export interface Passage {
  source: string;
  text: string; // "" where the memory does not hold all that was written
  share: number;
}

export interface DrawnOn {
  sources: Record<string, number>;
  passages: Passage[];
  known?: number | null;
}

export interface Message {
  role: "user" | "assistant";
  content: string;
}

export interface Page<T> {
  data: T[];
  has_more: boolean;
}

/** A request that was refused, or that reached nobody (status 0). */
export class Failed extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

const KEY = "latentmem key";

/** The key that requests carry; it is gone when the browser's tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value: string) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** A key that makes a write happen once. */
export const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((x) => x.toString(16)).join("-");

interface Ways {
  signal?: AbortSignal;
  once?: string;
}

async function request(method: string, path: string, body?: unknown, { signal, once }: Ways = {}): Promise<Response> {
  const headers: Record<string, string> = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (once) headers["Idempotency-Key"] = once;
  const form = body instanceof FormData || body instanceof Blob;
  if (body instanceof Blob) headers["Content-Type"] = "application/zip";
  else if (body !== undefined && !form) headers["Content-Type"] = "application/json";
  let response: Response;
  try {
    const content = body === undefined ? {} : { body: form ? body : JSON.stringify(body) };
    response = await fetch(path, { method, headers, ...content, ...(signal ? { signal } : {}) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failed("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw new Failed(await said(response), response.status);
  return response;
}

/** What an error says: the server's own words where there are any. */
async function said(response: Response): Promise<string> {
  try {
    const { error } = (await response.json()) as { error: { message: string } };
    return error.message.charAt(0).toUpperCase() + error.message.slice(1);
  } catch {
    return `The server answered with ${response.status}.`;
  }
}

const json = async <T>(method: string, path: string, body?: unknown, ways?: Ways): Promise<T> =>
  (await request(method, path, body, ways)).json() as Promise<T>;

const at = (id: string, rest = "") => `/v1/memories/${encodeURIComponent(id)}${rest}`;

export async function ready(): Promise<boolean> {
  try {
    await request("GET", "/ready");
    return true;
  } catch (error) {
    if (error instanceof Failed && error.status === 503) return false;
    throw error;
  }
}

/** Whether the key may write, too. */
export const writes = async () => (await json<{ writes: boolean }>("GET", "/v1/key")).writes;

export const model = async () => (await json<Page<{ id: string }>>("GET", "/v1/models")).data[0]?.id ?? "";

export async function memories(): Promise<MemoryInfo[]> {
  const found: MemoryInfo[] = [];
  for (let more = true; more; ) {
    const last = found.at(-1);
    const after = last ? `&after=${encodeURIComponent(last.id)}` : "";
    const page = await json<Page<MemoryInfo>>("GET", `/v1/memories?limit=100${after}`);
    found.push(...page.data);
    more = page.has_more && page.data.length > 0;
  }
  return found;
}

export const create = (body: { id: string; N?: number; longterm?: number; compression?: number }) =>
  json<MemoryInfo>("POST", "/v1/memories", body);
export const info = (id: string) => json<MemoryInfo>("GET", at(id));
export const remove = (id: string) => json<unknown>("DELETE", at(id));
export const slots = (id: string, version: number | null) =>
  json<Slots>("GET", at(id, version === null ? "/slots" : `/slots?version=${version}`));
export const stats = (id: string, version: number | null) =>
  json<Stats>("GET", at(id, version === null ? "/stats" : `/stats?version=${version}`));
export const history = (id: string, after: number | null, limit = 20, text = false) =>
  json<Page<HistoryLine>>(
    "GET",
    at(id, `/history?order=desc&limit=${limit}&text=${text}${after === null ? "" : `&after=${after}`}`),
  );
export const drawn = (id: string, messages: Message[], answer: string, version: number | null) =>
  json<DrawnOn>("POST", at(id, "/sources"), { messages, answer, version });
export const rollback = (id: string, version: number) => json<unknown>("POST", at(id, "/rollback"), { version });
export const fork = (id: string, name: string, version: number | null) =>
  json<MemoryInfo>("POST", at(id, "/fork"), { id: name, version });
export const forget = (id: string, source: string, exact: boolean) =>
  json<unknown>("POST", at(id, "/forget"), { source, exact });
export const pin = (id: string, source: string, pinned: boolean) =>
  json<unknown>("POST", at(id, "/pin"), { source, pinned });
export const expire = (id: string, source: string, after: number | null) =>
  json<unknown>("POST", at(id, "/expire"), { source, after });

/** Accept a text or a file; it is in the memory when `slots` shows the version. */
export async function write(
  id: string,
  what: { text: string; source: string } | { file: File },
  once: string,
): Promise<Written> {
  if ("text" in what) return json("POST", at(id, "/write"), { ...what, wait: false }, { once });
  try {
    await what.file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Failed("It can not be read any more, or is no file.", 0);
  }
  const form = new FormData();
  form.set("file", what.file);
  form.set("wait", "false");
  return json("POST", at(id, "/write"), form, { once });
}

/** The whole memory as a file that the browser saves. */
export async function save(id: string): Promise<void> {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await request("GET", at(id, "/export"))).blob());
  link.download = `${id}.zip`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export const bring = (id: string, file: File) => json<MemoryInfo>("POST", at(id, "/import"), file.slice());

/** The contents of server-sent events, as they come in. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop() ?? "";
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

interface Chunk {
  error?: { message: string };
  choices?: { delta?: { content?: string }; finish_reason?: string | null }[];
  memory?: Piece["memory"];
}

export interface Piece {
  text: string;
  cut?: boolean; // the answer was as long as one may be
  memory?: { version: number | null; written: number | null; empty?: boolean };
}

/** An answer, piece by piece; at its end which version was read, and which one holds what was said. */
export async function* chat(
  model: string,
  messages: Message[],
  memory: { id: string; version: number | null; write: "user" | "none"; window: number } | null,
  signal: AbortSignal,
): AsyncGenerator<Piece> {
  const body = { model, messages, stream: true, repeats: false, ...(memory ? { memory } : {}) };
  const response = await request("POST", "/v1/chat/completions", body, { signal });
  if (!response.body) return;
  for await (const data of unbroken(events(response.body), signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data) as Chunk;
    if (chunk.error) throw new Failed(chunk.error.message, 500);
    const first = chunk.choices?.[0];
    const piece: Piece = { text: first?.delta?.content ?? "", cut: first?.finish_reason === "length" };
    yield chunk.memory ? { ...piece, memory: chunk.memory } : piece;
  }
  throw new Failed(BROKEN, 0);
}

const BROKEN = "The connection broke off.";

/** What comes in, with the browser's words for a connection that is lost replaced by ours. */
async function* unbroken<T>(from: AsyncGenerator<T>, signal: AbortSignal): AsyncGenerator<T> {
  try {
    yield* from;
  } catch (error) {
    throw signal.aborted ? error : new Failed(BROKEN, 0);
  }
}
