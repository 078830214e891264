// Keeps the page's own files on the device, each checked against its SHA-256, and answers with them only: nothing is asked of the network
// once they are here, and nothing can be. It exists where the page is served; from a folder the page needs it not.

const VERSION = {{ version }};
const FILES = {{ files }};
const CACHE = `pneumofed ${registration.scope} ${VERSION}`; // all pages of one server share the caches

addEventListener("install", (event) => event.waitUntil(keep()));
addEventListener("activate", (event) => event.waitUntil(takeOver()));
addEventListener("fetch", (event) => event.respondWith(answer(event.request)));

async function keep() {
  const cache = await caches.open(CACHE);
  const wanted = Object.entries(FILES).map(([name, integrity]) => new Request(name, { integrity, cache: "reload" }));
  await cache.addAll(wanted);
  await skipWaiting(); // the page has all it needs within itself, so an older one that is open goes on
}

async function takeOver() {
  const older = (await caches.keys()).filter((name) => name.startsWith(`pneumofed ${registration.scope} `) && name !== CACHE);
  await Promise.all(older.map((name) => caches.delete(name)));
  await clients.claim();
}

async function answer(request) {
  const [address] = request.url.split(/[?#]/);
  const name = address.slice(registration.scope.length) || "index.html";
  const kept = address.startsWith(registration.scope) && name in FILES ? await (await caches.open(CACHE)).match(name) : undefined;
  return kept ?? Response.error();
}
