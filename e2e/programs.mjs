// The programs of one run: each is started, read line by line, and stopped.
import { spawn } from "node:child_process";
import { EventEmitter, once } from "node:events";
import { createServer } from "node:net";
import { createInterface } from "node:readline";

const running = new Set();

export class Program {
  lines = [];
  #printed = new EventEmitter();

  /** Of the caller's environment it sees only where programs, home and temporary files are. */
  constructor(name, command, { cwd, env }) {
    const { PATH, HOME, TMPDIR } = process.env;
    this.name = name;
    this.process = spawn(command[0], command.slice(1), {
      cwd, env: { PATH, HOME, TMPDIR, ...env }, stdio: ["ignore", "pipe", "pipe"],
    });
    running.add(this);
    for (const stream of [this.process.stdout, this.process.stderr]) {
      createInterface({ input: stream }).on("line", (line) => {
        this.lines.push(line);
        this.#printed.emit("line");
      });
    }
    this.closed = once(this.process, "close").then(([status, signal]) => {
      running.delete(this);
      return signal ?? status;
    });
  }

  count(pattern) {
    return this.lines.filter((line) => pattern.test(line)).length;
  }

  /** Waits until it has printed that many lines that match. */
  async printed(pattern, times = 1) {
    const ended = this.closed.then((how) => {
      throw new Error(`${this.name} ended (${how}):\n${this.lines.join("\n")}`);
    });
    while (this.count(pattern) < times) await Promise.race([once(this.#printed, "line"), ended]);
    ended.catch(() => {});
  }

  /** Asks it to end, and returns its exit status or the signal that ended it. */
  stop() {
    this.process.kill("SIGTERM");
    return this.closed;
  }
}

/** A port on which nobody listens. */
export const freePort = () => new Promise((resolve) => {
  const server = createServer().listen(0, "127.0.0.1", () => {
    const { port } = server.address();
    server.close(() => resolve(port));
  });
});

/** Shows what those that run printed last. */
export function showLines() {
  for (const { name, lines } of running) console.log([`-- ${name}`, ...lines.slice(-15)].join("\n   "));
}

/** Ends what runs, the last started first: a program may need those before it. */
export async function stopAll() {
  for (const program of [...running].reverse()) await program.stop();
}

process.on("exit", () => running.forEach((program) => program.process.kill("SIGKILL")));
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => stopAll().then(() => process.exit(1)));
