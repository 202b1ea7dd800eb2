import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { useWork } from "./util";

/** A question with a form, in front of everything else; Escape leaves it. */
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
  const submit = async (event: Event) => {
    event.preventDefault();
    if (!work.busy && (await work.run(props.onAct))) props.onClose();
  };
  return (
    <dialog ref={dialog} onClose={props.onClose} aria-labelledby="dialog-title">
      <form onSubmit={submit}>
        <h2 id="dialog-title">{props.title}</h2>
        {props.children}
        <Problem text={work.error} />
        <div class="row end">
          <button type="button" onClick={() => dialog.current?.close()}>
            Cancel
          </button>
          <button class={props.danger ? "danger" : "primary"} disabled={work.busy}>
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
