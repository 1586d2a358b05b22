"""A TCP proxy to a server on a local socket. It can fall silent without closing a connection."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Forwards bytes until `freeze`. Afterwards it still accepts connections and reads, but sends nothing."""

    port = 0

    def __init__(self) -> None:
        self._frozen = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()

    def freeze(self) -> None:
        self._frozen.set()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        while data := await reader.read(65536):
            if not self._frozen.is_set():
                writer.write(data)
        if not self._frozen.is_set():
            writer.close()

    async def serve(self, path: str, ready: threading.Event, stop: asyncio.Event) -> None:
        async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            away, back = await asyncio.open_unix_connection(path)
            with suppress(ConnectionError):
                await asyncio.gather(self._pass_on(reader, back), self._pass_on(away, writer))

        server = await asyncio.start_server(joined, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()  # ends transactions of the database, and the locks that they hold
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@contextmanager
def silent_proxy(path: str) -> Iterator[Proxy]:
    proxy, ready, stop, loop = Proxy(), threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy.serve(path, ready, stop)), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()
