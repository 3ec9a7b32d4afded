// The room: the avatar's picture and sound, what they measure, and coming back after a break.

let library = null;

/** LiveKit's client, from our own server. Raises Error with the server's sentence if it has none. */
export function loadLibrary() {
  library ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/vendor/livekit-client.js";
    script.onload = () => resolve(window.LivekitClient);
    script.onerror = async () => {
      library = null;
      let sentence = "the video library can't be loaded";
      try {
        sentence = (await (await fetch(script.src)).json()).error ?? sentence;
      } catch {
        // the server is gone: the next attempt tells
      }
      reject(new Error(sentence));
    };
    document.head.append(script);
  });
  return library;
}

export class Call {
  /** `on`: picture(), sound(allowed), state("connected" | "reconnecting"), speaker(gone). */
  constructor(video, on) {
    this.video = video;
    this.on = on;
    this.room = null;
    this.tracks = { video: null, audio: null };
    this.sounds = document.createElement("div");
    this.sounds.hidden = true;
    document.body.append(this.sounds);
  }

  /** Join, and resolve when the room is left: true if it was on purpose. */
  async attend(ticket, signal) {
    const client = await loadLibrary();
    if (signal.aborted) return true;
    const { Room, RoomEvent, Track } = client;
    const room = new Room({ adaptiveStream: false, dynacast: false, disconnectOnPageLeave: true });
    this.room = room;
    let left;
    const over = new Promise((resolve) => (left = resolve));
    room
      .on(RoomEvent.TrackSubscribed, (track) => {
        if (track.kind === Track.Kind.Video) {
          this.tracks.video = track;
          track.attach(this.video);
        } else if (track.kind === Track.Kind.Audio) {
          this.tracks.audio = track;
          this.sounds.append(track.attach());
          this.on.sound(room.canPlaybackAudio);
        }
      })
      .on(RoomEvent.TrackUnsubscribed, (track) => {
        for (const element of track.detach()) if (element !== this.video) element.remove();
        if (this.tracks[track.kind] === track) this.tracks[track.kind] = null;
        if (track.kind === Track.Kind.Video) this.on.speaker(true);
      })
      .on(RoomEvent.AudioPlaybackStatusChanged, () => this.on.sound(room.canPlaybackAudio))
      .on(RoomEvent.Reconnecting, () => this.on.state("reconnecting"))
      .on(RoomEvent.SignalReconnecting, () => this.on.state("reconnecting"))
      .on(RoomEvent.Reconnected, () => this.on.state("connected"))
      .on(RoomEvent.Disconnected, () => left(false));
    const leave = () => left(true);
    signal.addEventListener("abort", leave);
    try {
      await room.connect(ticket.url, ticket.token, { maxRetries: 1, peerConnectionTimeout: 15_000 });
      this.on.state("connected");
      this.on.sound(room.canPlaybackAudio);
      return await over;
    } finally {
      signal.removeEventListener("abort", leave);
      await room.disconnect();
      this.sounds.replaceChildren();
      this.tracks = { video: null, audio: null };
      if (this.room === room) this.room = null;
    }
  }

  /** Call it from a click or a key: browsers want one before they make sound. */
  async allowSound() {
    if (this.room && !this.room.canPlaybackAudio) {
      await this.room.startAudio().catch(() => {});
    }
  }

  get canSound() {
    return this.room?.canPlaybackAudio ?? false;
  }

  get present() {
    return this.tracks.video !== null;
  }
}

/** Pictures really shown in the last second, from the element itself. */
export class FrameCounter {
  constructor(video) {
    this.video = video;
    this.times = [];
    if ("requestVideoFrameCallback" in HTMLVideoElement.prototype) {
      const seen = (now) => {
        this.times.push(now);
        video.requestVideoFrameCallback(seen);
      };
      video.requestVideoFrameCallback(seen);
    }
  }

  /** Frames a second, or null when none came lately. */
  read() {
    const now = performance.now();
    this.times = this.times.filter((time) => now - time < 2_000);
    if (this.times.length < 3) return null;
    const span = this.times.at(-1) - this.times[0];
    return span > 0 ? ((this.times.length - 1) * 1000) / span : null;
  }
}

/** What WebRTC measures, as differences between two looks at it. */
export class Meter {
  constructor() {
    this.last = {};
    this.delay = 0.08; // seconds that sound waits in the browser, until it is measured
  }

  async read(tracks) {
    const found = { fps: null, jitter: null, bitrate: null, rtt: null };
    for (const [kind, track] of Object.entries(tracks)) {
      const report = await track?.getRTCStatsReport();
      report?.forEach((stat) => {
        if (stat.type === "inbound-rtp" && stat.kind === kind) this.#inbound(stat, found);
        if (stat.type === "candidate-pair" && stat.nominated && stat.currentRoundTripTime != null) {
          found.rtt = stat.currentRoundTripTime * 1000;
        }
      });
    }
    return found;
  }

  #inbound(stat, found) {
    const before = this.last[stat.id];
    this.last[stat.id] = stat;
    if (stat.jitter != null) found.jitter = Math.max(found.jitter ?? 0, stat.jitter * 1000);
    if (stat.kind === "video") found.fps = stat.framesPerSecond ?? null;
    if (!before || stat.timestamp <= before.timestamp) return;
    const seconds = (stat.timestamp - before.timestamp) / 1000;
    const bits = (8 * (stat.bytesReceived - before.bytesReceived)) / seconds;
    if (bits >= 0) found.bitrate = (found.bitrate ?? 0) + bits;
    const emitted = stat.jitterBufferEmittedCount - before.jitterBufferEmittedCount;
    if (stat.kind === "audio" && emitted > 0) {
      this.delay = Math.min(1, (stat.jitterBufferDelay - before.jitterBufferDelay) / emitted);
    }
  }
}
