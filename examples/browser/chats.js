// The conversations that this browser keeps: `{ id, at, turns }`, newest first, each under a key of its own.
const PREFIX = "orchd.chat.";
const MOST = 20;

export const keyOf = (chat) => PREFIX + chat.id;

export function all() {
  return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map(read).filter(Boolean).sort((a, b) => b.at - a.at);
}

export const find = (id) => read(PREFIX + id);

/** Keeps a conversation. The oldest ones make room, also where the browser's storage is full. */
export function save(chat) {
  const others = all().filter((other) => other.id !== chat.id);
  for (const old of others.splice(MOST - 1)) localStorage.removeItem(keyOf(old));
  const text = JSON.stringify({ ...chat, at: Date.now() });
  for (;;) {
    try {
      return localStorage.setItem(keyOf(chat), text);
    } catch {
      if (others.length === 0) return;  // too long for this browser: it lives as long as its tab
      localStorage.removeItem(keyOf(others.pop()));
    }
  }
}

export const forget = () => all().forEach((chat) => localStorage.removeItem(keyOf(chat)));

function read(key) {
  try {
    const chat = JSON.parse(localStorage.getItem(key));
    return Array.isArray(chat?.turns) ? chat : null;
  } catch {
    return null;
  }
}
