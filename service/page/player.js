// Plays a clip in its own pixels. Video has a scrubber that shows the frame; GIF and WebP play as a browser shows pictures.

/** Whether a clip is a picture to browsers. */
export const isPicture = url => /\.(gif|webp)$/.test(url);

/** The largest part of the window's height that a clip takes. */
const HEIGHT = 0.7;

export class Player {
  constructor(screen, controls) {
    this.screen = screen;
    this.video = screen.querySelector("video");
    this.preview = screen.querySelector("#preview");
    this.picture = screen.querySelector("#picture");
    this.empty = screen.querySelector("p");
    this.controls = controls;
    this.button = controls.querySelector("button");
    this.scrubber = controls.querySelector("input");
    this.position = controls.querySelector("output");
    this.frames = 1;
    const { video } = this;
    video.addEventListener("loadedmetadata", () => this.fit());
    for (const image of [this.preview, this.picture]) image.addEventListener("load", () => this.fit());
    new ResizeObserver(() => this.fit()).observe(screen);
    for (const kind of ["play", "pause"]) video.addEventListener(kind, () => this.showState());
    this.button.addEventListener("click", () => (video.paused ? this.play() : video.pause()));
    video.addEventListener("click", () => this.button.click());
    this.scrubber.addEventListener("input", () => {
      video.pause();
      video.currentTime = (Number(this.scrubber.value) + 0.5) * video.duration / this.frames;
    });
    const follow = (_, { mediaTime }) => {
      this.showFrame(mediaTime);
      video.requestVideoFrameCallback(follow);
    };
    if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(follow);
    else video.addEventListener("timeupdate", () => this.showFrame(video.currentTime));
  }

  play() {
    this.video.play().catch(() => {});
  }

  /** Shows a clip of so many frames, and plays it unless the user wants less motion. */
  show(url, frames) {
    if (isPicture(url)) {
      this.picture.src = url;
      this.showOnly(this.picture);
      return;
    }
    this.frames = frames;
    this.scrubber.max = frames - 1;
    this.video.src = url;
    this.showOnly(this.video);
    this.showFrame(0);
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.play();
  }

  /** Shows a frame of a clip that is being made. */
  showPreview(url) {
    this.preview.src = url;
    this.showOnly(this.preview);
  }

  /** Shows neither, until there is one. */
  clear() {
    this.video.pause();
    this.showOnly(this.empty);
  }

  showOnly(shown) {
    for (const one of [this.video, this.picture, this.preview, this.empty]) one.hidden = one !== shown;
    this.controls.hidden = shown !== this.video;
  }

  showFrame(seconds) {
    const last = this.frames - 1;
    const frame = Math.min(last, Math.floor(seconds / (this.video.duration || 1) * this.frames + 0.01));
    if (document.activeElement !== this.scrubber || !this.video.paused) this.scrubber.value = frame;
    this.position.value = `${frame} / ${last}`;
    this.scrubber.setAttribute("aria-valuetext", `frame ${frame}`);
  }

  showState() {
    const { paused } = this.video;
    this.button.textContent = paused ? "▶" : "❚❚";
    this.button.setAttribute("aria-label", paused ? "Play" : "Pause");
  }

  /** Scales clip and preview by whole numbers of the screen's pixels, or down to the room that there is. */
  fit() {
    const { video, picture, preview, screen } = this;
    const side = Math.min(screen.clientWidth, HEIGHT * innerHeight), box = side * devicePixelRatio;
    const images = [picture, preview].map(image => [image, image.naturalWidth, image.naturalHeight]);
    for (const [shown, width, height] of [[video, video.videoWidth, video.videoHeight], ...images]) {
      if (!width) continue;
      const whole = Math.floor(box / Math.max(width, height));
      shown.style.width = `${whole ? whole * width / devicePixelRatio : side * width / Math.max(width, height)}px`;
      shown.classList.toggle("pixelated", whole > 1);
    }
  }
}
