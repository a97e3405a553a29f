// Verifies tokens as strangers do: jose and openid-client find the keys by OIDC discovery, and oidc-provider
// is an OAuth authorization server that takes tokens as its client's assertions (RFC 7523). It reads what to
// do as JSON from standard input, and writes what came of it as JSON.
import http from 'node:http';
import { text } from 'node:stream/consumers';
import * as jose from 'jose';
import * as client from 'openid-client';

const task = JSON.parse(await text(process.stdin));
const out = {};
const attempt = async (f) => {
  try { return { ok: true, ...(await f()) }; } catch (e) { return { ok: false, error: String(e.cause?.error_description ?? e.error_description ?? e.message ?? e) }; }
};

// What a relying party does: the document, its keys, the token.
const found = await client.discovery(new URL(task.issuer), task.client, undefined, client.None());
const meta = found.serverMetadata();
out.issuer = meta.issuer;
const keys = jose.createRemoteJWKSet(new URL(meta.jwks_uri));
out.jose = await attempt(async () => {
  const { payload } = await jose.jwtVerify(task.token, keys, { issuer: task.issuer, audience: task.audience });
  return { sub: payload.sub };
});
out.joseOther = await attempt(async () => {
  await jose.jwtVerify(task.token, keys, { issuer: task.issuer, audience: 'another' });
  return {};
});

// The authorization server. Its warnings are for who would run it in production.
console.warn = console.info = () => {};
const { default: Provider } = await import('oidc-provider');
const as = new Provider(task.as, {
  clients: [{
    client_id: task.client, token_endpoint_auth_method: 'private_key_jwt', token_endpoint_auth_signing_alg: 'ES256',
    jwks_uri: meta.jwks_uri, grant_types: ['client_credentials'], redirect_uris: [], response_types: [],
  }],
  clientAuthMethods: ['private_key_jwt', 'none'],
  features: { clientCredentials: { enabled: true }, devInteractions: { enabled: false } },
  fetch: (url, options) => { delete options.dispatcher; return fetch(url, options); },
});
const server = http.createServer(as.callback());
await new Promise((done) => server.listen(new URL(task.as).port, '127.0.0.1', done));

const login = (assertion) => attempt(async () => {
  const config = await client.discovery(new URL(task.as), task.client, undefined, (_as, _client, body) => {
    body.set('client_id', task.client);
    body.set('client_assertion_type', 'urn:ietf:params:oauth:client-assertion-type:jwt-bearer');
    body.set('client_assertion', assertion);
  }, { execute: [client.allowInsecureRequests] });
  const tokens = await client.clientCredentialsGrant(config);
  return { type: tokens.token_type };
});
out.logins = [];
for (const assertion of task.assertions) out.logins.push(await login(assertion));
server.close();
server.closeAllConnections();
process.stdout.write(JSON.stringify(out));
