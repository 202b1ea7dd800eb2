"""The tables of a store's database."""

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE memories (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
CREATE TABLE versions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    memory INTEGER NOT NULL REFERENCES memories,
    seq INTEGER NOT NULL,
    base INTEGER REFERENCES versions,
    event TEXT NOT NULL,
    payload TEXT NOT NULL,
    key TEXT,
    state TEXT NOT NULL,
    error TEXT,
    attempts INTEGER NOT NULL,
    kind TEXT NOT NULL,
    object TEXT,
    bytes INTEGER NOT NULL,
    facts TEXT NOT NULL,
    time REAL NOT NULL,
    UNIQUE (memory, seq),
    UNIQUE (memory, key)
);
CREATE INDEX children ON versions (base);
CREATE INDEX pending ON versions (memory) WHERE state = 'pending';
CREATE INDEX objects ON versions (object);
CREATE TABLE expiries (
    memory INTEGER NOT NULL REFERENCES memories, source TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (memory, source)
);
CREATE TABLE building (object TEXT NOT NULL, memory INTEGER NOT NULL);
"""
ACCOUNTS = (
    "CREATE TABLE IF NOT EXISTS accounts (version INTEGER PRIMARY KEY, memory INTEGER NOT NULL, account TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS accounts_of ON accounts (memory, version)",
    "CREATE TRIGGER IF NOT EXISTS gone AFTER DELETE ON versions BEGIN DELETE FROM accounts WHERE version = OLD.id; END",
)
