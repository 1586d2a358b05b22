"""One file for each version of the database's schema, which Alembic runs in order. A released file never changes."""
