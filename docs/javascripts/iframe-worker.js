/* Search of a page that was opened from the disk. A browser starts no worker there, so this one runs in a hidden frame, with the part of
   a worker's interface that the theme uses. The theme would load a script for this from the network, unless one of this name is given. */
(() => {
  if (location.protocol !== "file:") return;

  class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.frame = frame.contentWindow;
      this.loaded = new Promise((done) => {
        const inside = this.frame.document;
        this.frame.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        this.frame.importScripts = (...urls) => Promise.all(urls.map((one) => load(inside, one)));
        load(inside, url).then(done);
      });
    }

    postMessage(data) {
      this.loaded.then(() => this.frame.dispatchEvent(new this.frame.MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.frameElement.remove();
    }
  }

  function load(inside, url) {
    return new Promise((done, failed) => {
      const script = inside.createElement("script");
      script.src = new URL(url, location.href);
      script.onload = done;
      script.onerror = failed;
      inside.body.appendChild(script);
    });
  }

  window.Worker = FrameWorker;
})();
