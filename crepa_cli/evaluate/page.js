"use strict";
// One clock drives all videos: each is set to its time, and played in between so that it stays smooth.
const LARGEST_DRIFT = 0.08;
const videos = [...document.querySelectorAll("video")];
const cursors = [...document.querySelectorAll(".cursor")];
const [play, slider, time, speed] = ["play", "at", "time", "speed"].map((id) => document.getElementById(id));
const seconds = Math.max(...videos.map((video) => Number(video.dataset.seconds)));
const visible = new Set();
let playing = false;
let now = 0;
let before = 0;

// The middle of the frame that is shown at a time: at its edge, browsers differ in which one they show.
function place(video) {
  const half = 0.5 / Number(video.dataset.fps);
  return Math.min(now + half, Number(video.dataset.seconds) - half);
}

function show() {
  slider.value = now;
  time.textContent = `${now.toFixed(2)} s`;
  for (const cursor of cursors) {
    const x = (cursor.ownerSVGElement.viewBox.baseVal.width * now) / seconds;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
}

function seek(to) {
  now = to;
  for (const video of videos) video.currentTime = place(video);
  show();
}

function follow(video) {
  const over = now >= Number(video.dataset.seconds);
  if (!playing || over || !visible.has(video)) {
    video.pause();
    return;
  }
  video.playbackRate = Number(speed.value);
  if (Math.abs(video.currentTime - place(video)) > LARGEST_DRIFT) video.currentTime = place(video);
  if (video.paused) video.play().catch(() => {});
}

function tick(at) {
  if (!playing) return;
  now += ((at - before) / 1000) * Number(speed.value);
  before = at;
  if (now >= seconds) seek(0);
  videos.forEach(follow);
  show();
  requestAnimationFrame(tick);
}

function set(on) {
  playing = on;
  play.textContent = on ? "Pause" : "Play";
  before = performance.now();
  if (on) requestAnimationFrame(tick);
  else {
    videos.forEach(follow);
    seek(now);
  }
}

const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) visible.add(entry.target);
    else visible.delete(entry.target);
  }
});
videos.forEach((video) => observer.observe(video));
slider.max = seconds;
play.addEventListener("click", () => set(!playing));
slider.addEventListener("input", () => {
  if (playing) set(false);
  seek(Number(slider.value));
});
document.addEventListener("keydown", (event) => {
  if (event.key === " " && event.target === document.body) {
    event.preventDefault();
    set(!playing);
  }
});
show();
