// Better Auth and a page that uses it, on the origin BETTER_AUTH_URL: node auth-server.mjs AUTH.mjs CLIENT.js
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";

const [authFile, clientFile] = process.argv.slice(2);
const { auth } = await import(authFile);
await (await getMigrations(auth.options)).runMigrations();
const betterAuth = toNodeHandler(auth);

const files = {
  "/": ["text/html", '<!doctype html><link rel="icon" href="data:,"><script src="/client.js"></script>'],
  "/client.js": ["text/javascript", readFileSync(clientFile)],
};

createServer((request, response) => {
  console.log(request.method, request.url);
  if (request.url.startsWith("/api/auth/")) return betterAuth(request, response);
  const [type, body] = files[request.url] ?? ["text/plain", ""];
  response.writeHead(body ? 200 : 404, { "Content-Type": type }).end(body);
}).listen(new URL(process.env.BETTER_AUTH_URL).port, "localhost", () => console.log("listening"));
