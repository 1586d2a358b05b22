CREATE TABLE files (
    id VARCHAR(64) NOT NULL,
    key_id VARCHAR(64) NOT NULL,
    name TEXT NOT NULL,
    content_type TEXT NOT NULL,
    size BIGINT NOT NULL,
    object_name TEXT NOT NULL,
    created_at FLOAT NOT NULL,
    expires_at FLOAT,
    PRIMARY KEY (id)
);

CREATE INDEX ix_files_expires_at ON files (expires_at);

CREATE TABLE keys (
    id VARCHAR(64) NOT NULL,
    name TEXT NOT NULL,
    secret_hash VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL,
    revoked_at FLOAT,
    PRIMARY KEY (id)
);

CREATE TABLE logs (
    number INTEGER NOT NULL,
    request_id VARCHAR(64) NOT NULL,
    message TEXT NOT NULL,
    level VARCHAR(8) NOT NULL,
    created_at FLOAT NOT NULL,
    labels TEXT NOT NULL,
    PRIMARY KEY (number)
);

CREATE INDEX ix_logs_request_id ON logs (request_id);

CREATE TABLE requests (
    sequence INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    id VARCHAR(64) NOT NULL,
    key_id VARCHAR(64) NOT NULL,
    kind VARCHAR(8) NOT NULL,
    input TEXT,
    state VARCHAR(8) NOT NULL,
    priority INTEGER NOT NULL,
    created_at FLOAT NOT NULL,
    start_by FLOAT,
    started_at FLOAT,
    finished_at FLOAT,
    keep_io BOOLEAN NOT NULL,
    retry BOOLEAN NOT NULL,
    object_seconds FLOAT,
    webhook TEXT,
    base_url TEXT NOT NULL,
    home VARCHAR(64),
    owner VARCHAR(64),
    lease_until FLOAT,
    attempts INTEGER NOT NULL,
    crashes INTEGER NOT NULL,
    cancelled BOOLEAN NOT NULL,
    status INTEGER,
    body TEXT,
    error TEXT,
    error_type VARCHAR(64),
    seconds FLOAT,
    UNIQUE (id)
);

CREATE INDEX requests_in_order ON requests (state, priority, sequence);

CREATE INDEX requests_of_key ON requests (key_id, state);

CREATE INDEX requests_that_never_started ON requests (key_id, created_at) WHERE state = 'done' AND started_at IS NULL;

CREATE TABLE secrets (
    name VARCHAR(64) NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (name)
);

CREATE TABLE webhooks (
    request_id VARCHAR(64) NOT NULL,
    url TEXT NOT NULL,
    host VARCHAR(255) NOT NULL,
    attempts INTEGER NOT NULL,
    next_at FLOAT,
    last_error TEXT,
    PRIMARY KEY (request_id)
);

CREATE INDEX ix_webhooks_next_at ON webhooks (next_at);
