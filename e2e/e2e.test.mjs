// What the README promises to a page in a browser, tried with the real parts. Started by ./run.
import assert from "node:assert/strict";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createServer } from "node:net";
import { after, afterEach, before, describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { showLines, stopAll } from "./programs.mjs";
import { newPage, startDevelopment, startMode, stopBrowser } from "./stand.mjs";

const limit = { timeout: 180_000 }; // something that never comes must not hold up the rest
const stands = {};

before(async () => {
  await startDevelopment();
  for (const mode of ["jwks", "secret"]) stands[mode] = await startMode(mode);
}, limit);
afterEach(({ passed }) => { if (!passed) showLines(); });
after(async () => {
  await stopBrowser();
  for (const { database } of Object.values(stands)) await database.end();
  await stopAll();
});

/** What the page's own script gets to see of an answer to fetch. */
function ask(page, url, init, by = "fetch") {
  return page.evaluate(async ([url, init, by]) => {
    const response = await window[by](url, init);
    const text = await response.text();
    const { status, headers } = response;
    return { status, headers: Object.fromEntries(headers), url: response.url, body: text && JSON.parse(text) };
  }, [url, init, by]);
}

/** The same through taskflow() of client.ts, as whoever is signed in. */
const call = (page, path, init) => ask(page, path, init, "taskflow");

/** Signs a new user up as a front end does, and returns the user's id. */
function signUp(page, name) {
  return page.evaluate(async (name) => {
    const user = { name, email: `${name}@example.com`, password: "correct horse" };
    const { data, error } = await authClient.signUp.email(user);
    if (error) throw new Error(JSON.stringify(error));
    return data.user.id;
  }, name);
}

const freshToken = (page) => page.evaluate(async () => (await authClient.token()).data.token);
const decoded = (token) => token.split(".", 2).map((part) => JSON.parse(Buffer.from(part, "base64url")));
/** no-store: else Chromium's cache makes a request wait for another one of the same address. */
const bearer = (token) => ({ headers: { Authorization: `Bearer ${token}` }, cache: "no-store" });
const sending = (method, body, headers) =>
  ({ method, headers: { "Content-Type": "application/json", ...headers }, body: JSON.stringify(body) });
const detail = ({ status, body }) => [status, body.detail];

for (const mode of ["jwks", "secret"]) {
  describe(`a page with Better Auth (${mode})`, limit, () => {
    let page, api, tasks, token;
    before(() => { ({ page, api } = stands[mode]); });

    it("signs a user up and gets a token", async () => {
      const user = await signUp(page, "ann");
      tasks = stands[mode].tasks = `/api/${user}/tasks`;
      token = await freshToken(page);
      const [header, claims] = decoded(token);
      const { origin } = stands[mode];
      assert.equal(header.alg, mode === "jwks" ? "EdDSA" : "HS256");
      assert.deepEqual([claims.sub, claims.iss, claims.aud], [user, origin, origin]);
    });

    it("creates one task, however often and at the same time it asks with one Idempotency-Key", async () => {
      const headers = { "Idempotency-Key": "key-1", "X-Request-ID": "from-the-page" };
      const create = { ...sending("POST", { title: "Buy milk" }, headers), credentials: "include" };
      const answers = await Promise.all([call(page, tasks, create), call(page, tasks, create)]);
      answers.push(await call(page, tasks, create));
      const [{ body: task }] = answers;
      assert.deepEqual([task.title, task.description, task.is_completed], ["Buy milk", null, false]);
      for (const { status, headers, body } of answers) {
        assert.deepEqual([status, headers.location], [201, `${tasks}/${task.id}`]);
        assert.deepEqual([headers["x-request-id"], headers.etag?.[0]], ["from-the-page", '"']);
        assert.deepEqual(body, task);
      }
      const other = await call(page, tasks, sending("POST", { title: "Another" }, headers));
      assert.deepEqual([other.status, other.body.detail[0].loc], [422, ["header", "Idempotency-Key"]]);
      assert.deepEqual((await call(page, tasks)).body, [task]);
    });

    it("lists with parameters, and follows Link from page to page to the end", async () => {
      for (const title of ["b 100%", "c", "d", "a"]) await call(page, tasks, sending("POST", { title }));
      const pages = [];
      let path = `${tasks}?limit=2&sort_by=title&order=desc&is_completed=false`;
      while (path && pages.length < 9) {
        const { headers, body, url } = await call(page, path);
        pages.push(body.map((task) => task.title));
        const next = /<([^>]+)>; rel="next"/.exec(headers.link)?.[1];
        path = next && new URL(next, url).href.slice(api.length);
      }
      assert.deepEqual(pages, [["d", "c"], ["b 100%", "a"], ["Buy milk"]]);
      const found = await call(page, `${tasks}?search=${encodeURIComponent("100%")}`);
      assert.deepEqual(found.body.map((task) => task.title), ["b 100%"]);
    });

    it("learns from If-None-Match, its own or the browser's, that a task is unchanged", async () => {
      const [task] = (await call(page, tasks)).body;
      const path = `${tasks}/${task.id}`;
      const { headers: { etag } } = await call(page, path);
      const own = await call(page, path, { headers: { "If-None-Match": etag } });
      assert.deepEqual([own.status, own.headers.etag, own.body], [304, etag, ""]);
      const cached = await call(page, path);
      assert.deepEqual([cached.status, cached.body], [200, task]);
      await stands[mode].service.printed(/"status":304/, 2);
    });

    it("lists again without a transfer while nothing has changed: the browser does that by itself", async () => {
      const { service } = stands[mode];
      const first = await call(page, tasks);
      const seen = service.count(/"status":304/);
      const again = await call(page, tasks);
      assert.deepEqual([again.status, again.body, again.headers.etag], [200, first.body, first.headers.etag]);
      await service.printed(/"route":"[^"]*tasks","status":304/, 1);
      assert.equal(service.count(/"status":304/), seen + 1);
      await call(page, tasks, sending("POST", { title: "new in the list" }));
      assert.equal((await call(page, tasks)).body.length, first.body.length + 1);
      const { id } = (await call(page, `${tasks}?search=new+in`)).body[0];
      await call(page, `${tasks}/${id}`, { method: "DELETE" });
    });

    it("changes and deletes a task with If-Match, and reads 412 when somebody was faster", async () => {
      const [{ id }] = (await call(page, tasks)).body;
      const path = `${tasks}/${id}`;
      const ifMatch = { "If-Match": (await call(page, path)).headers.etag };
      const change = { is_completed: true, description: "Two bottles" };
      const { status, headers, body } = await call(page, path, sending("PATCH", change, ifMatch));
      assert.deepEqual([status, body.is_completed, body.description], [200, true, "Two bottles"]);
      for (const late of [sending("PATCH", { title: "Late" }, ifMatch), { method: "DELETE", headers: ifMatch }]) {
        assert.deepEqual(detail(await call(page, path, late)), [412, "Task has been modified"]);
      }
      assert.deepEqual((await call(page, path)).body, body);
      assert.equal((await call(page, path, { method: "DELETE", headers: { "If-Match": headers.etag } })).status, 204);
      assert.deepEqual(detail(await call(page, path)), [404, "Task not found"]);
    });

    it("can read why it was refused: 401, 403, 404, 405, 413, 415, 422", async () => {
      const big = sending("POST", { title: "x", description: "y".repeat(2 << 20) });
      const text = { method: "POST", headers: { "Content-Type": "text/plain" }, body: '{"title":"x"}' };
      const missing = [{ type: "missing", loc: ["body", "title"], msg: "Field required", input: {} }];
      assert.deepEqual(detail(await ask(page, api + tasks)), [401, "Invalid authorization header"]);
      assert.deepEqual(detail(await ask(page, api + tasks, bearer("a.b.c"))), [401, "Invalid token"]);
      assert.deepEqual(detail(await ask(page, `${api}/api/somebody/tasks`, bearer(token))), [403, "Forbidden"]);
      assert.deepEqual(detail(await call(page, `${tasks}/999999`)), [404, "Task not found"]);
      assert.deepEqual(detail(await ask(page, `${api}/nowhere`)), [404, "Not Found"]);
      assert.deepEqual(detail(await ask(page, `${api}/health`, { method: "POST" })), [405, "Method Not Allowed"]);
      assert.deepEqual(detail(await call(page, tasks, big)), [413, "Request body too large"]);
      assert.deepEqual(detail(await call(page, tasks, text)), [415, "Unsupported media type: send application/json"]);
      assert.deepEqual(detail(await call(page, tasks, sending("POST", {}))), [422, missing]);
    });

    it("sees none of this user's tasks as another user, whose token client.ts gets by itself", async () => {
      await page.evaluate(() => authClient.signOut());
      const other = await signUp(page, "bob");
      assert.deepEqual((await call(page, `/api/${other}/tasks`)).body, []);
      assert.deepEqual(detail(await call(page, tasks)), [403, "Forbidden"]);
      await page.evaluate(() => authClient.signIn.email({ email: "ann@example.com", password: "correct horse" }));
      assert.equal((await call(page, tasks)).body.length, 4);
    });

    it("was preceded by the browser's preflights, all of them answered with 204", () => {
      const { service } = stands[mode];
      const preflights = service.count(/"method":"OPTIONS"/);
      assert.ok(preflights >= 5);
      assert.equal(service.count(/"method":"OPTIONS".*"status":204/), preflights);
    });

    it("of another origin, or of none, reads nothing, whatever token it has", async () => {
      const { page: stranger } = stands[mode === "jwks" ? "secret" : "jwks"];
      const { service } = stands[mode];
      await stranger.evaluate(() => {
        document.body.append(Object.assign(document.createElement("iframe"), { sandbox: "allow-scripts" }));
      });
      const before = service.count(/"msg":"request"/);
      for (const frame of stranger.frames().slice(-2)) { // the page, and the sandboxed frame, whose origin is null
        for (const request of [[`${api}/health`], [api + tasks, bearer(token)]]) {
          const outcome = await frame.evaluate((request) => fetch(...request).then(() => "read", String), request);
          assert.equal(outcome, "TypeError: Failed to fetch");
        }
      }
      await service.printed(/"msg":"request"/, before + 4); // they did reach the service
    });

    it("finds its tasks again after a restart of the service", async () => {
      const { body } = await call(page, tasks);
      assert.equal(await stands[mode].service.stop(), 0);
      await stands[mode].startService();
      assert.deepEqual((await call(page, tasks)).body, body);
    });

    it("gives a token with which each call of /docs can be tried in production", async () => {
      const docs = await openDocs(api);
      await docs.fill("#token", await freshToken(page));
      await tryEverything(docs);
    });
  });
}

it("a token of the one mode does not count in the other", limit, async () => {
  for (const [mine, other] of [[stands.jwks, stands.secret], [stands.secret, stands.jwks]]) {
    const foreign = bearer(await freshToken(other.page));
    assert.deepEqual(detail(await ask(mine.page, mine.api + mine.tasks, foreign)), [401, "Invalid token"]);
  }
});

/** Opens /docs. What its console complains of, violations of its policy too, and requests elsewhere become faults. */
async function openDocs(api) {
  const docs = await newPage();
  docs.faults = [];
  docs.on("console", (message) => ["error", "warning"].includes(message.type()) && docs.faults.push(message.text()));
  docs.on("pageerror", (error) => docs.faults.push(String(error)));
  docs.on("request", (request) => {
    if (!request.url().startsWith("data:") && !request.url().startsWith(`${api}/`)) docs.faults.push(request.url());
  });
  const response = await docs.goto(`${api}/docs`);
  assert.match(response.headers()["content-security-policy"], /default-src 'none'/);
  return docs;
}

/** Presses Send for every operation of the document and expects the answer that the document names first. */
async function tryEverything(docs) {
  const { paths } = await docs.evaluate(async () => (await fetch("/openapi.json")).json());
  const operations = Object.values(paths).flatMap(Object.values).filter((each) => each.operationId);
  assert.equal(operations.length, 9);
  for (const { operationId, responses } of operations) {
    assert.equal(await press(docs, operationId, "button.primary"), Object.keys(responses)[0], operationId);
    if (operationId === "createTask") await tryPages(docs);
  }
  assert.deepEqual(docs.faults, []);
}

async function tryPages(docs) {
  assert.equal(await press(docs, "createTask", "button.primary"), "201"); // a second one
  await docs.fill("#listTasks [name=limit]", "1");
  const body = docs.locator("#listTasks .result pre").last();
  assert.equal(await press(docs, "listTasks", "button.primary"), "200");
  const [first] = JSON.parse(await body.textContent());
  assert.equal(await press(docs, "listTasks", "button:text('Next page')"), "200");
  const [second] = JSON.parse(await body.textContent());
  assert.ok(second.id > first.id);
}

/** Presses a button of an operation and returns the status that the page then shows. */
async function press(docs, operationId, button) {
  const state = docs.locator(`#${operationId} [role=status]`);
  await state.evaluate((node) => node.replaceChildren());
  await docs.click(`#${operationId} ${button}`);
  await state.filter({ hasText: / ms$/ }).waitFor();
  return state.locator(".status").textContent();
}

describe("a key of Better Auth", limit, () => {
  let stand, page, url, old, token; // token is of the newest key, old of the one before, and unknown to the service
  before(() => {
    stand = stands.jwks;
    ({ page } = stand);
    url = stand.api + stand.tasks;
  });

  const statusWith = async (token) => (await ask(page, url, bearer(token))).status;
  const unavailable = ({ status, body, headers }) =>
    assert.deepEqual([status, body.detail, headers["retry-after"]], [503, "Service temporarily unavailable", "1"]);
  /** The service fetches keys at most once in 5 seconds; what is to be seen here is what it does after that. */
  const untilFetchAllowed = () => sleep(5_100);
  const expire = `UPDATE jwks SET "expiresAt" = now() - interval '1 second'`;
  /** Makes Better Auth sign with a new key from now on. The service has seen neither of the two tokens. */
  const rotate = async (statement) => {
    await untilFetchAllowed();
    old = await freshToken(page);
    await stand.database.query(statement);
    token = await freshToken(page);
    assert.notEqual(decoded(token)[0].kid, decoded(old)[0].kid);
  };
  /** Asks again after each 503 when Retry-After says, as a patient page does. */
  const patiently = async (token) => {
    for (;;) {
      const { status, headers } = await ask(page, url, bearer(token));
      if (status !== 503) return status;
      await sleep(headers["retry-after"] * 1000);
    }
  };

  it("that is new counts at once after a rotation, and the one before goes on counting", async () => {
    await rotate(expire);
    const fetches = stand.auth.count(/api.auth.jwks/);
    assert.deepEqual([await statusWith(token), await statusWith(old)], [200, 200]);
    await stand.auth.printed(/api.auth.jwks/, fetches + 1);
    assert.equal(stand.auth.count(/api.auth.jwks/), fetches + 1);
  });

  it("that Better Auth no longer lists stops counting, and client.ts gets a token of the new one", async () => {
    await rotate("DELETE FROM jwks");
    assert.deepEqual([await statusWith(token), await statusWith(old)], [200, 401]);
    assert.equal((await call(page, stand.tasks)).status, 200);
  });

  it("that is known waits for nothing while the endpoint hangs; another gets a 503 in 3 seconds", async (test) => {
    await rotate(expire);
    await stand.auth.stop();
    const silent = createServer().listen(new URL(stand.origin).port, "localhost");
    test.after(() => silent.close());
    await once(silent, "listening");
    let answered = false;
    const waiting = ask(page, url, bearer(token)).finally(() => { answered = true; });
    await once(silent, "connection");
    const start = Date.now();
    assert.deepEqual([await statusWith(old), answered], [200, false]);
    unavailable(await waiting);
    assert.ok(Date.now() - start < 5_000);
  });

  it("that is known counts while nothing listens there, and a restart of the service signs nobody out", async () => {
    await untilFetchAllowed();
    unavailable(await ask(page, url, bearer(token)));
    assert.equal(await statusWith(old), 200);
    assert.equal(await stand.service.stop(), 0);
    await stand.startService();
    unavailable(await ask(page, url, bearer(old)));
    await stand.startAuth();
    assert.deepEqual([await patiently(token), await patiently(old)], [200, 200]);
  });
});

it("the README shows the code that was tried here", () => {
  const readme = readFileSync("../README.md", "utf8");
  for (const file of ["auth-jwks.ts", "auth-secret.ts", "client.ts"]) {
    assert.ok(readme.includes("```ts\n" + readFileSync(file, "utf8") + "```\n"), file);
  }
});
