// A small TaskFlow client. It is compiled, not run, by `npm run check`: what openapi.json says must make types with which
// every call can be written without a cast, and with which a wrong call does not compile.
import createClient from "openapi-fetch";
import type { components, operations, paths } from "./api.js";

export type Task = components["schemas"]["Task"];
export type TaskUpdate = components["schemas"]["TaskUpdate"];
type ListQuery = NonNullable<operations["listTasks"]["parameters"]["query"]>;
type Failure = components["schemas"]["Error"] | components["schemas"]["ValidationError"];

export class TaskFlowError extends Error {
  constructor(readonly status: number, failure: Failure | undefined) {
    super(failure ? sentence(failure) : `status ${status}`);
  }
}

/** The detail of any error, on one line. */
function sentence({ detail }: Failure): string {
  return typeof detail === "string" ? detail : detail.map((fault) => `${fault.loc.join(".")}: ${fault.msg}`).join("; ");
}

export function taskflow(baseUrl: string, userId: string, token: string) {
  const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });
  const path = { user_id: userId };

  return {
    /** All tasks that the query selects, page by page. */
    async *list(query: ListQuery = {}): AsyncGenerator<Task> {
      for (let cursor: string | undefined; ; ) {
        const page = cursor === undefined ? query : { ...query, cursor };
        const { data, error, response } = await client.GET("/api/{user_id}/tasks", { params: { path, query: page } });
        if (!data) throw new TaskFlowError(response.status, error);
        yield* data;
        const next = /<([^>]*)>; rel="next"/.exec(response.headers.get("Link") ?? "")?.[1];
        cursor = next === undefined ? undefined : (new URL(next, response.url).searchParams.get("cursor") ?? undefined);
        if (cursor === undefined) return;
      }
    },

    /** Creates a task; call it again with the same key when the answer was lost. */
    async create(title: string, description: string | null, key: string): Promise<Task> {
      const { data, error, response } = await client.POST("/api/{user_id}/tasks", {
        params: { path, header: { "Idempotency-Key": key } },
        body: { title, description },
      });
      if (!data) throw new TaskFlowError(response.status, error);
      return data;
    },

    /** The task and its entity tag; null when it is still the one that the known tag names. */
    async get(taskId: number, known?: string): Promise<{ task: Task; etag: string | null } | null> {
      const { data, error, response } = await client.GET("/api/{user_id}/tasks/{task_id}", {
        params: { path: { ...path, task_id: taskId }, header: known === undefined ? {} : { "If-None-Match": known } },
      });
      if (response.status === 304) return null;
      if (!data) throw new TaskFlowError(response.status, error);
      return { task: data, etag: response.headers.get("ETag") };
    },

    /** Changes the task if it still has the entity tag. */
    async update(taskId: number, change: TaskUpdate, etag: string): Promise<Task> {
      const { data, error, response } = await client.PATCH("/api/{user_id}/tasks/{task_id}", {
        params: { path: { ...path, task_id: taskId }, header: { "If-Match": etag } },
        body: change,
      });
      if (!data) throw new TaskFlowError(response.status, error);
      return data;
    },

    async remove(taskId: number): Promise<void> {
      const { error, response } = await client.DELETE("/api/{user_id}/tasks/{task_id}", {
        params: { path: { ...path, task_id: taskId } },
      });
      if (response.status !== 204) throw new TaskFlowError(response.status, error);
    },

    async healthy(): Promise<boolean> {
      const { data } = await client.GET("/health");
      return data?.status === "healthy";
    },

    async ready(): Promise<boolean> {
      const { data } = await client.GET("/ready");
      return data?.status === "ready";
    },

    async document(): Promise<Record<string, unknown> | undefined> {
      return (await client.GET("/openapi.json")).data;
    },

    async page(): Promise<string | undefined> {
      return (await client.GET("/docs", { parseAs: "text" })).data;
    },
  };
}

// What the contract forbids must not compile.
export const clear: TaskUpdate = { description: null };
// @ts-expect-error a title cannot be cleared
export const noTitle: TaskUpdate = { title: null };
// @ts-expect-error is_completed is a boolean and nothing else
export const wordForBoolean: TaskUpdate = { is_completed: "true" };
// @ts-expect-error a task needs a title
export const untitled: components["schemas"]["TaskCreate"] = { description: "Two bottles" };
// @ts-expect-error an unknown sort order
export const unsorted: ListQuery = { sort_by: "priority" };
// @ts-expect-error all fields of a task are always there
export const partial: Task = { id: 1, user_id: "u", title: "t", is_completed: false };
