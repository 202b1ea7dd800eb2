"""How smoothly the page draws a large memory, in headless Chromium: frames of the page at rest beside frames at work.

    python benchmarks/page.py
    python benchmarks/page.py --slots 10000 --layers 30 --seconds 5

The memory is the worst one: no two neighbouring slots are of the same update. Nothing of a model is loaded: the answers
of the server are made here. "Pointer" moves over the picture, which is drawn anew with each move; "writing" is a write
that changes the whole picture each time the page asks for it. A frame takes 16.7 ms where the browser keeps up.
"""

import argparse
import json
import platform
import shutil
import statistics
import time
from datetime import date

from playwright.sync_api import Page, Route, sync_playwright

from latentmem.serve.http import static

ORIGIN = "http://page.test"
FRAMES = """seconds => new Promise(done => {
  const frames = []; let last = performance.now(); const end = last + 1000 * seconds;
  const frame = now => { frames.push(now - last); last = now; now < end ? requestAnimationFrame(frame) : done(frames.slice(2)); };
  requestAnimationFrame(frame); })"""  # noqa: E501


class Server:
    """Answers that the page gets.

    Args:
        L, N: layers and slots of the memory.
    """

    def __init__(self, L: int, N: int) -> None:
        self.L, self.N, self.updates, self.pending, self.pictures = L, N, N, 0, 0
        self.info = {"id": "m", "versions": 2, "changed": "2026-01-01T00:00:00Z", "bytes": 1, "M": N, "N": N}

    def slots(self) -> dict:
        """The picture; each time one update further."""
        self.updates += self.pending
        self.pictures += 1
        runs = [x for i in range(self.N) for x in (i % 8, self.updates - self.N + i + 1, 1)]
        writing = {"done": 1, "total": 2} if self.pending else None
        facts = {"L": self.L, "M": self.N, "N": self.N, "K": 256, "R": 0, "updates": self.updates, "stored": 0}
        sources = [f"source {i}" for i in range(8)]
        return {"id": "m", "version": 1, **facts, "sources": sources, "layers": [runs] * self.L, "writing": writing}

    def __call__(self, route: Route) -> None:
        path = route.request.url.removeprefix(ORIGIN).partition("?")[0]
        if path in static.files():
            content, kind = static.files()[path]
            return route.fulfill(body=content, content_type=kind)
        info = self.info | {"pending": self.pending, "model": "none"}
        answers = {
            "/ready": {"status": "ok"},
            "/v1/models": {"data": [{"id": "none"}]},
            "/v1/key": {"writes": True},
            "/v1/memories": {"data": [info], "has_more": False},
            "/v1/memories/m": info,
            "/v1/memories/m/stats": {"version": 1, "half_life": 5, "sources": []},
            "/v1/memories/m/history": {"data": [], "has_more": False},
        }
        answer = self.slots() if path.endswith("/slots") else answers[path]
        return route.fulfill(body=json.dumps(answer), content_type="application/json")


def told(name: str, frames: list[float], rest: float) -> float:
    """Print one line; gives the median."""
    middle = statistics.median(frames)
    late = sorted(frames)[int(0.95 * len(frames))]
    ratio = middle / rest if rest else 1
    print(f"| {name} | {len(frames)} | {middle:.1f} | {late:.1f} | {max(frames):.0f} | {ratio:.2f} |")
    return middle


def pointer(page: Page, seconds: float) -> list[float]:
    """Frames while the pointer moves over the picture."""
    page.evaluate(f"window.found = ({FRAMES})({seconds})")
    box, end, i = page.locator("canvas").bounding_box(), time.monotonic() + seconds, 0
    assert box is not None
    while time.monotonic() < end:
        i += 1
        page.mouse.move(box["x"] + i * 7 % box["width"], box["y"] + i * 3 % box["height"])
    return page.evaluate("window.found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if path is None:
        raise SystemExit("there is no browser; install chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page, server = browser.new_page(viewport={"width": 1440, "height": 900}), Server(args.layers, args.slots)
        page.route("**/*", server)
        page.goto(f"{ORIGIN}/")
        page.locator("canvas").wait_for()
        page.wait_for_timeout(1000)
        print(f"{date.today()}, {platform.machine()}, Chromium {browser.version}, {args.layers} layers of {args.slots}")
        print(
            "\n| page | frames | median ms | 95% ms | longest ms | median / at rest |"
            "\n| --- | --- | --- | --- | --- | --- |"
        )
        rest = told("at rest", page.evaluate(FRAMES, args.seconds), 0)
        told("pointer", pointer(page, args.seconds), rest)
        server.pending = 1
        page.wait_for_timeout(3000)
        before = server.pictures
        told("writing", page.evaluate(FRAMES, args.seconds), rest)
        print(f"\nwriting: {(server.pictures - before) / args.seconds:.1f} pictures a second")
        browser.close()


if __name__ == "__main__":
    main()
