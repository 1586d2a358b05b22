// What the page keeps in this browser, in IndexedDB: the form, the drawings, and the inputs of its requests. Each says
// whose it is, so that the next user of the browser is not shown it.
const opened = new Promise((resolve, reject) => {
  const request = indexedDB.open("sparsectrl-lcm", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("page");
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
opened.catch(() => {});  // each use of it deals with the error

async function ask(mode, use) {
  const store = (await opened).transaction("page", mode).objectStore("page");
  return new Promise((resolve, reject) => {
    const request = use(store);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Returns a saved value, or undefined if there is none or the browser keeps none. */
export const load = name => ask("readonly", store => store.get(name)).catch(() => undefined);

/** Saves a value. A browser that keeps nothing, as in some private windows, is no error. */
export const save = (name, value) => ask("readwrite", store => store.put(value, name)).catch(() => {});

/** Returns the id of a key, which is no secret; nothing without a key. */
export const owner = key => /^([^:]+):/.exec(key)?.[1] ?? "";

/** As `load`, if the value was saved for this key. */
export async function loadOf(key, name) {
  const saved = await load(name);
  return saved?.owner === owner(key) ? saved.value : undefined;
}

/** As `save`, for a key. It replaces what was saved for another one. */
export const saveOf = (key, name, value) => save(name, { owner: owner(key), value });
