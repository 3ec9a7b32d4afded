// Talk through the avatar: the microphone as live sound of the session.

import { socketAddress } from "./api.js";

const BEHIND = 200_000; // bytes that may wait in the socket (2 s); what is said meanwhile is dropped

export class Microphone {
  /** `onEnd(sentence | null)` when it stopped by itself. */
  constructor(onEnd) {
    this.onEnd = onEnd;
    this.stream = this.context = this.socket = null;
  }

  get on() {
    return this.stream !== null;
  }

  async start(session) {
    if (!navigator.mediaDevices) {
      throw new Error("the browser gives the microphone to https:// and localhost pages only");
    }
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
      });
    } catch (error) {
      throw new Error(
        error.name === "NotAllowedError"
          ? "the browser was not allowed to use the microphone"
          : "there is no microphone that can be used"
      );
    }
    try {
      this.context = new AudioContext();
      await this.context.audioWorklet.addModule("/web/mic-worklet.js");
      await this.#connect(session);
      const source = this.context.createMediaStreamSource(this.stream);
      const pieces = new AudioWorkletNode(this.context, "pieces", { numberOfOutputs: 0 });
      pieces.port.onmessage = ({ data }) => {
        if (this.socket?.readyState === WebSocket.OPEN && this.socket.bufferedAmount < BEHIND) {
          this.socket.send(data);
        }
      };
      source.connect(pieces);
    } catch (error) {
      this.stop();
      throw error;
    }
  }

  #connect(session) {
    const rate = String(this.context.sampleRate);
    const address = socketAddress(`/sessions/${session}/audio`, { rate, mode: "interrupt" });
    const socket = (this.socket = new WebSocket(address));
    return new Promise((resolve, reject) => {
      socket.onopen = () => resolve();
      socket.onerror = () => reject(new Error("the server took no live sound"));
      socket.onmessage = ({ data }) => {
        const message = JSON.parse(data);
        if (message.type === "error") this.#ended(message.error);
      };
      socket.onclose = () => this.#ended(null);
    });
  }

  #ended(sentence) {
    if (!this.on) return;
    this.stop();
    this.onEnd(sentence);
  }

  stop() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = null;
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send('{"end": true}');
    this.socket?.close();
    this.socket = null;
    this.context?.close();
    this.context = null;
  }
}
