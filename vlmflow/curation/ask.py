"""One machinery for every step that asks an endpoint: each request once, journalled, counted, many at a time.

A step says for each sample what to ask next, given the answers so far (a *script*: a generator that yields requests, is
sent answers, and returns the layer's row). Everything else is here: identical requests are asked once, answers outlive a
kill (journal), open requests and pictures in memory are bounded, tokens and cost are added up.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmflow import storage
from vlmflow.curation.chat_format import ChatAnswer, ChatRequest, Endpoint, fingerprint
from vlmflow.curation.journal import Journal
from vlmflow.curation.openai_client import Client
from vlmflow.errors import ServiceError

if TYPE_CHECKING:
    from vlmflow.step import Context

Row = dict[str, Any]
Script = Generator[ChatRequest, ChatAnswer, Row]
COLUMNS = {"requests": "int", "prompt_tokens": "int", "completion_tokens": "int"}
"""What a row cost. A request that several samples of a shard share is counted at the first of them."""
REMEMBERED = 2**16  # answers that later shards of the same run may share


def columns(*servers: str) -> dict[str, str]:
    """Cost columns of a step that asks these servers ("" and, for example, "repair")."""
    return {prefixed(server, name): kind for server in servers for name, kind in COLUMNS.items()}


def answered(row: Row) -> Script:
    """The script of a sample that needs no answer."""
    return row
    yield


def finished(script: Script) -> Row:
    """The row of such a script."""
    try:
        next(script)
    except StopIteration as end:
        return end.value
    raise TypeError("the script asks something, and there is nobody to answer")


def prefixed(server: str, name: str) -> str:
    """Name of a cost column of a server."""
    return f"{server}_{name}" if server else name


class Spent(NamedTuple):
    """One request of a sample: server, fingerprint, and what its answer cost."""

    server: str
    name: str
    answer: ChatAnswer


@dataclass
class _Shard:
    """What is going on in one shard."""

    book: Journal
    found: dict[str, list[Any]]
    waiting: dict[str, asyncio.Future[ChatAnswer]] = field(default_factory=dict)
    rows: dict[int, tuple[Row, list[Spent]]] = field(default_factory=dict)


class Asker:
    """Plays scripts against the servers of a step; connections and shared answers last over all its shards.

    Args:
        name: ``LAYER/DIGEST`` under which answers are journalled.
        endpoints: by the name that requests give in `to`.

    Raises:
        RecipeError: an address is not configured.
    """

    def __init__(self, ctx: Context, name: str, endpoints: Mapping[str, Endpoint]) -> None:
        self._ctx, self._name = ctx, name
        self.clients = {server: Client(one) for server, one in endpoints.items()}
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # used and closed in different threads
        self._reader = ThreadPoolExecutor(1, "reader")
        self._known: OrderedDict[str, ChatAnswer] = OrderedDict()
        self._books: list[Journal] = []
        self._started = False

    def close(self) -> None:
        """End the connections."""
        if self._started:
            self._runner.run(self._close())
        self._runner.close()
        self._reader.shutdown()

    async def _close(self) -> None:
        for client in self.clients.values():
            await client.__aexit__()

    def rows(self, shard: str, scripts: Iterable[Script], pictures: bool = False) -> list[Row]:
        """The rows that the scripts return, in their order, with their costs.

        Args:
            shard: what the journal is called after the step's name.
            pictures: making a script takes time (pictures are read and decoded); it is done beside the asking. At most
                as many scripts exist at a time as requests may be open.

        Raises:
            ServiceError: a server does not work, or more requests than its `lost_limit` were lost to trouble that
                passes: written down, these failures would stay when the server is well again.
        """
        self._forget()
        book = Journal(self._ctx, f"{self._name}/{shard}")
        state = _Shard(book, book.found())
        try:
            self._runner.run(self._play_all(state, iter(scripts), pictures))
            self._judge(state)
        except BaseException:
            book.close(done=False)
            raise
        self._books.append(book)
        return _costed(state.rows)

    def _forget(self) -> None:
        """Close the journals whose part is written by now."""
        for book in list(self._books):
            if storage.exists(storage.join(self._ctx.root, "layers", book.name + ".parquet")):
                self._books.remove(book)
                book.close(done=True)

    async def _play_all(self, state: _Shard, scripts: Iterator[Script], pictures: bool) -> None:
        if not self._started:
            for client in self.clients.values():
                await client.__aenter__()
            self._started = True
        loop, numbered = asyncio.get_running_loop(), enumerate(scripts)

        async def worker() -> None:
            while True:
                if pictures:
                    item = await loop.run_in_executor(self._reader, next, numbered, None)
                else:
                    item = next(numbered, None)
                if item is None:
                    return
                state.rows[item[0]] = await self._play(state, item[1])

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(max(client.endpoint.concurrency for client in self.clients.values())):
                    group.create_task(worker())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _play(self, state: _Shard, script: Script) -> tuple[Row, list[Spent]]:
        spent: list[Spent] = []
        try:
            request = next(script)
            while True:
                name = fingerprint(self.clients[request.to].endpoint, request)
                answer = await self._answer(state, request, name)
                spent.append(Spent(request.to, name, answer))
                request = script.send(answer)
        except StopIteration as end:
            return end.value, spent

    async def _answer(self, state: _Shard, request: ChatRequest, name: str) -> ChatAnswer:
        """From the journal, from another sample's identical request, or from the server."""
        if name in state.found:
            return ChatAnswer(*state.found[name])
        if name in state.waiting:
            return await asyncio.shield(state.waiting[name])
        if (answer := self._known.get(name)) is None:
            state.waiting[name] = asyncio.get_running_loop().create_future()
            answer = await self.clients[request.to].ask(request, name)
            state.waiting.pop(name).set_result(answer)
        if answer.passing:
            return answer
        state.found[name] = [
            answer.text, answer.finish, answer.prompt_tokens, answer.completion_tokens, answer.error,
        ]  # fmt: skip
        state.book.add(name, state.found[name])
        self._known[name] = answer
        self._known.move_to_end(name)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return answer

    def _judge(self, state: _Shard) -> None:
        for server, client in self.clients.items():
            limits = client.endpoint
            answers = {s.name: s.answer for _, spent in state.rows.values() for s in spent if s.server == server}
            lost = Counter(str(answer.error) for answer in answers.values() if answer.passing)
            if lost.total() > limits.lost_limit * len(answers):
                reasons = "; ".join(f"{n} x {reason}" for reason, n in lost.most_common(3))
                raise ServiceError(
                    f"the server that {limits.url_env} names left {lost.total()} of {len(answers)} requests without an answer "
                    f"after {limits.attempts} attempts each ({reasons}); the recipe allows {limits.lost_limit:.1%} "
                    "(lost_limit). Finished shards and the answers of this one stay: mend the server and run the same "
                    "command again."
                )


def _costed(rows: Mapping[int, tuple[Row, list[Spent]]]) -> list[Row]:
    """Rows in order, each with what it was the first to ask for: the same whatever was asked when, or found again."""
    seen: set[str] = set()
    out = []
    for number in sorted(rows):
        row, spent = rows[number]
        cost: Counter[str] = Counter()
        for server, name, answer in spent:
            tokens = {
                "requests": 1,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
            }
            first = name not in seen
            cost.update({prefixed(server, column): n * first for column, n in tokens.items()})
            seen.add(name)
        out.append({**row, **cost})
    return out
