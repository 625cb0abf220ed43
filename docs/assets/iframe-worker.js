// The search of the site, where the pages are files. Browsers start no worker from a file: URL (each file is an origin
// of its own there); so the script of the worker runs in a hidden frame instead, which the page's own origin writes.
// mkdocs-material would load the npm package iframe-worker for this from the network (mkdocs.yml, `polyfills`).
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #ready;

    constructor(url) {
      super();
      this.#frame.hidden = true;
      document.body.append(this.#frame);
      const inside = this.#frame.contentWindow;
      // What a worker has and a frame has not. What is posted goes straight to this object.
      inside.document.open();
      inside.document.write("<!doctype html><body></body>");
      inside.document.close();
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const load = (source) => new Promise((loaded, failed) => {
        const script = inside.document.createElement("script");
        script.src = source;
        script.onload = loaded;
        script.onerror = () => failed(new Error(`${source} cannot be loaded`));
        inside.document.body.append(script);
      });
      // One after the other; the search awaits them, which a worker need not.
      inside.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => load(new URL(source, url).href)), Promise.resolve());
      this.#ready = load(url);
    }

    postMessage(data) {
      this.#ready.then(() => {
        const inside = this.#frame.contentWindow;
        inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      });
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
