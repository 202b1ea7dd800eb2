/**
 * Whoever goes by keyboard stays where they are: when the element that has the focus goes away, the heading of the
 * nearest part around it that is still there takes the focus over. Returns how to end that.
 */
export function keepFocus(): () => void {
  let around: Element[] = []; // the focused element and all that it stands in, innermost first
  const took = (event: FocusEvent) => {
    around = [];
    for (let one = event.target as Element | null; one; one = one.parentElement) around.push(one);
  };
  const left = (event: FocusEvent) => {
    if (!event.relatedTarget) queueMicrotask(() => around[0]?.isConnected && (around = [])); // by a click beside it
  };
  const watch = new MutationObserver(() => {
    const [lost, ...parts] = around;
    if (!lost || lost.isConnected || document.activeElement !== document.body) return;
    around = [];
    for (const part of parts) {
      const heading = part.isConnected && [...part.querySelectorAll<HTMLElement>("[tabindex='-1']")].find((one) => one.checkVisibility());
      if (heading) return heading.focus({ preventScroll: true });
    }
  });
  addEventListener("focusin", took);
  addEventListener("focusout", left);
  watch.observe(document.body, { childList: true, subtree: true });
  return () => {
    removeEventListener("focusin", took);
    removeEventListener("focusout", left);
    watch.disconnect();
  };
}
