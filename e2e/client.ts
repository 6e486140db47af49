import { createAuthClient } from "better-auth/client"; // in React: "better-auth/react"
import { jwtClient } from "better-auth/client/plugins";

export const authClient = createAuthClient({ plugins: [jwtClient()] });

let token: string | undefined;

/** fetch() to TaskFlow as the signed-in user. A token lives 15 minutes; one that is refused is replaced, once. */
export async function taskflow(path: string, init: RequestInit = {}): Promise<Response> {
  for (let fresh = !token; ; fresh = true) {
    if (fresh) token = (await authClient.token()).data?.token;
    const headers = new Headers(init.headers);
    headers.set("Authorization", `Bearer ${token}`);
    const response = await fetch(`${process.env.NEXT_PUBLIC_TASKFLOW_URL}${path}`, { ...init, headers });
    if (fresh || (response.status !== 401 && response.status !== 403)) return response;
  }
}
