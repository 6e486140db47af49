// What the tests drive: the service in development, whose private PostgreSQL all share, and for each mode of Better
// Auth a service in production, a Better Auth on another origin, one database for both, and a page in a browser.
import { randomBytes } from "node:crypto";
import { join } from "node:path";
import { buildSync } from "esbuild";
import pg from "pg";
import { chromium } from "playwright-core";
import { freePort, Program } from "./programs.mjs";

const here = import.meta.dirname;
const folder = process.env.E2E_FOLDER; // ./run has put bin/ and dev/ there, and removes it
const databaseURL = (name) => `postgresql://taskflow@/${name}?host=${join(folder, ".taskflow")}`;

async function connect(name) {
  const client = new pg.Client(databaseURL(name));
  await client.connect();
  return client;
}

const taskflow = (name, program, env) => new Program(`taskflow (${name})`, [join(folder, program)], { cwd: folder, env });

/** Starts the service in development, with its private PostgreSQL, and returns its address. */
export async function startDevelopment() {
  const port = await freePort();
  const service = taskflow("development", "dev/run", { PORT: port });
  await service.printed(/^curl /);
  return `http://127.0.0.1:${port}`;
}

/** Starts Better Auth and the service, configured as the README says, and opens a page of Better Auth's origin. */
export async function startMode(mode) {
  const origin = `http://localhost:${await freePort()}`;
  const port = await freePort();
  const api = `http://127.0.0.1:${port}`;
  const secret = randomBytes(32).toString("base64");
  const files = bundle(mode, api);

  const admin = await connect("postgres");
  await admin.query(`CREATE DATABASE ${mode}`);
  await admin.end();

  const stand = { origin, api, database: await connect(mode), page: await newPage() };
  stand.startAuth = async () => {
    stand.auth = new Program(`Better Auth (${mode})`, [process.execPath, "auth-server.mjs", ...files], {
      cwd: here, env: { DATABASE_URL: databaseURL(mode), BETTER_AUTH_URL: origin, BETTER_AUTH_SECRET: secret },
    });
    await stand.auth.printed(/^listening/);
  };
  stand.startService = async () => {
    stand.service = taskflow(mode, "bin/taskflow", {
      ENVIRONMENT: "production", HOST: "127.0.0.1", PORT: port, DATABASE_URL: databaseURL(mode),
      CORS_ORIGINS: origin, BETTER_AUTH_ISSUER: origin, BETTER_AUTH_AUDIENCE: origin,
      ...(mode === "jwks" ? { BETTER_AUTH_JWKS_URL: `${origin}/api/auth/jwks` } : { BETTER_AUTH_SECRET: secret }),
    });
    await stand.service.printed(/"msg":"ready"/);
  };
  await stand.startAuth();
  await stand.startService();
  await stand.page.goto(origin);
  return stand;
}

/** Makes what Node and what the page can load of the README's code; the former where Node finds its packages. */
function bundle(mode, api) {
  const options = { bundle: true, logLevel: "warning", absWorkingDir: here };
  const authFile = join(here, "node_modules", ".e2e", `auth-${mode}.mjs`);
  const auth = { entryPoints: [`auth-${mode}.ts`], outfile: authFile };
  buildSync({ ...options, ...auth, platform: "node", format: "esm", packages: "external" });
  const clientFile = join(folder, `client-${mode}.js`);
  const client = { entryPoints: ["client.ts"], outfile: clientFile, globalName: "client" };
  const define = { "process.env.NEXT_PUBLIC_TASKFLOW_URL": JSON.stringify(api) };
  buildSync({ ...options, ...client, define, footer: { js: "Object.assign(window, client);" } });
  return [authFile, clientFile];
}

let browser;

/** Opens an empty page of its own, without cookies and cache of others. */
export async function newPage() {
  browser ??= await startBrowser();
  return (await browser.newContext()).newPage();
}

/** Chromium has no sandbox where root runs it, nor where a machine has no user namespaces. */
function startBrowser() {
  const launch = (chromiumSandbox) => chromium.launch({ executablePath: process.env.CHROMIUM, chromiumSandbox });
  return process.getuid() === 0 ? launch(false) : launch(true).catch(() => launch(false));
}

export const stopBrowser = () => browser?.close();
