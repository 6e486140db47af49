import { betterAuth } from "better-auth";
import { jwt } from "better-auth/plugins";
import { SignJWT } from "jose";
import { Pool } from "pg";

const secret = new TextEncoder().encode(process.env.BETTER_AUTH_SECRET);

export const auth = betterAuth({
  database: new Pool({ connectionString: process.env.DATABASE_URL }),
  emailAndPassword: { enabled: true },
  plugins: [
    jwt({
      jwt: { sign: (claims) => new SignJWT(claims).setProtectedHeader({ alg: "HS256" }).sign(secret) },
      // Better Auth wants both beside a sign of one's own; TaskFlow uses neither.
      jwks: { remoteUrl: `${process.env.BETTER_AUTH_URL}/api/auth/jwks`, keyPairConfig: { alg: "EdDSA" } },
    }),
  ],
});
