"""The web server of the pull benchmark, a process of its own whose CPU time is nobody's: pictures out of memory, endless
bodies and slow drips. Run as `python pull_server.py FOLDER`; prints its port."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

ENDLESS = 400_000_000  # bytes
BLOCK = b"\xff\xd8\xff\xe0" + b"\x55" * ((1 << 18) - 4)


def head(length: int) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {length}\r\n\r\n".encode()


async def drip(writer: asyncio.StreamWriter, picture: bytes, rate: int) -> None:
    """A picture at `rate` bytes per second, a tenth of it at a time, so that no read ever waits long."""
    writer.write(head(len(picture)))
    for at in range(0, len(picture), max(1, rate // 10)):
        writer.write(picture[at : at + max(1, rate // 10)])
        await writer.drain()
        await asyncio.sleep(0.1)


async def main(folder: Path) -> None:
    pictures = {path.name: path.read_bytes() for path in sorted(folder.glob("*.jpg"))}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                path = request.split(b" ", 2)[1].decode()
                kind, _, rest = path.lstrip("/").partition("/")
                if kind == "img":
                    picture = pictures[rest]
                    writer.write(head(len(picture)))
                    writer.write(picture)
                elif kind == "endless":
                    writer.write(head(ENDLESS).replace(b"Content-Length", b"X-Length"))
                    for _ in range(ENDLESS // len(BLOCK)):
                        writer.write(BLOCK)
                        await writer.drain()
                    return
                elif kind == "drip":
                    rate, name = rest.split("/")[:2]
                    await drip(writer, pictures[name][:30_000], int(rate))
                else:
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 16, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
