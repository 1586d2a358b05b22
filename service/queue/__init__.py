"""The queue: how a request is submitted, waits, is prepared, is run and ends."""
