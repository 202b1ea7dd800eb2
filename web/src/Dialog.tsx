import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { Failed } from "./api";
import { useWork } from "./util";

/** A question with a form, in front of everything else; Escape leaves it, as long as nothing is being done. */
export function Dialog(props: {
  title: string;
  act: string;
  danger?: boolean;
  onAct: () => Promise<void>;
  onClose: () => void;
  children?: ComponentChildren;
}) {
  const dialog = useRef<HTMLDialogElement>(null);
  const work = useWork();
  useEffect(() => dialog.current?.showModal(), []);
  useEffect(() => {
    if (!work.busy) return;
    const stay = (event: KeyboardEvent) => event.key === "Escape" && event.preventDefault(); // a second one would close it
    document.addEventListener("keydown", stay, true);
    return () => document.removeEventListener("keydown", stay, true);
  }, [work.busy]);
  const act = async () => {
    try {
      await props.onAct();
    } catch (error) {
      if (!(error instanceof Failed) || error.status !== 504) throw error;
      throw new Failed("It takes longer than a request may. It goes on, and is shown here when it is done.", 504);
    }
  };
  const submit = async (event: Event) => {
    event.preventDefault();
    if (!work.busy && (await work.run(act))) dialog.current?.close();
  };
  return (
    <dialog
      ref={dialog}
      onClose={props.onClose}
      onCancel={(event) => work.busy && event.preventDefault()}
      aria-labelledby="dialog-title"
    >
      <form onSubmit={submit}>
        <h2 id="dialog-title">{props.title}</h2>
        {props.children}
        <Problem text={work.error} />
        <div class="row end">
          <button type="button" aria-disabled={work.busy} onClick={() => work.busy || dialog.current?.close()}>
            Cancel
          </button>
          <button class={props.danger ? "danger" : "primary"} aria-disabled={work.busy}>
            {work.busy ? "Working …" : props.act}
          </button>
        </div>
      </form>
    </dialog>
  );
}

/** What went wrong, said at once. */
export function Problem({ text }: { text: string }) {
  return (
    <div role="alert" class="problem" hidden={!text}>
      {text}
    </div>
  );
}
