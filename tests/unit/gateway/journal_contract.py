"""What every journal of answers does, whatever keeps it. `tests/fleet` runs this against a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tandem.core.answers import AnswerState, Appended, Claim, Limits, News, Standing
from tandem.gateway.answers.journal import Journal

LIMITS = Limits(keep_s=600, open_s=1200, tenant_bytes=4096, total_bytes=8192)
Opener = Callable[..., Journal]
"""(incarnation, limits) → the journal, as a gateway of that incarnation sees it."""

ME, YOU = "aaaa", "bbbb"
OPEN, FREE, DONE, VOID = AnswerState.OPEN, AnswerState.FREE, AnswerState.DONE, AnswerState.VOID


async def claim(journal: Journal, owner: str, name: str = "n", **fields: Any) -> Claim:
    values: dict[str, Any] = {"tenant": "t", "fingerprint": "f", "number": f"of-{owner}", "created": 7, **fields}
    return await journal.claim(name, owner=owner, **values)


async def add(
    journal: Journal,
    place: int,
    entry: bytes = b"x",
    owner: str = f"{ME}:1",
    state: AnswerState = OPEN,
    name: str = "n",
) -> Appended:
    return await journal.append(name, owner=owner, place=place, entry=entry, state=state)


class JournalContract:
    """Subclass it with a fixture `open_journal`."""

    async def test_the_first_owns_an_answer_and_the_others_join(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        found = await asyncio.gather(*(claim(journal, f"{ME}:{n}") for n in range(1, 6)))
        assert [one.standing for one in found].count(Standing.OWNED) == 1
        assert len({one.number for one in found}) == 1
        assert {(one.created, len(one.log)) for one in found} == {(7, 0)}

    async def test_another_request_is_told_from_it(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        assert (await claim(journal, f"{ME}:2", fingerprint="g")).standing is Standing.MISMATCH

    async def test_what_is_appended_is_read_in_order(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        entries = [b"%d\0\xff" % number for number in range(1, 13)]
        for place, entry in enumerate(entries, 1):
            assert await add(journal, place, entry) is Appended.WRITTEN
        for after in (0, 5, 9, 10, 12):
            found = await journal.news("n", after=after, within=0)
            assert found == News(state=OPEN, owner=f"{ME}:1", alive=True, born=f"{ME}:1", log=entries[after:])

    async def test_an_entry_that_is_written_again_is_there_once(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        assert [await add(journal, 1, b"a") for _ in range(2)] == [Appended.WRITTEN] * 2
        assert [await add(journal, 2, b"b", state=DONE) for _ in range(2)] == [Appended.WRITTEN] * 2
        assert (await claim(journal, f"{ME}:2")).log == [b"a", b"b"]

    async def test_a_complete_answer_is_claimed_whole(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        await add(journal, 1, b"a", state=DONE)
        found = await claim(journal, f"{ME}:2", number="x", created=9)
        assert found == Claim(standing=Standing.DONE, number=f"of-{ME}:1", created=7, born=f"{ME}:1", log=[b"a"])
        assert not await journal.take("n", before=f"{ME}:1", owner=f"{ME}:2")

    async def test_who_claims_what_was_let_go_of_goes_on_with_it(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        await add(journal, 1, b"a", state=FREE)
        assert (await claim(journal, f"{ME}:2")).standing is Standing.OWNED
        assert (await claim(journal, f"{ME}:3")).standing is Standing.JOINED
        assert await add(journal, 2, b"b", owner=f"{ME}:2") is Appended.WRITTEN

    async def test_an_owner_lets_go_without_knowing_the_log(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        assert await add(journal, 1, b"a") is Appended.WRITTEN
        assert await add(journal, 1, b"", state=FREE) is Appended.WRITTEN
        found = await claim(journal, f"{ME}:2")
        assert (found.standing, found.log) == (Standing.OWNED, [b"a"])

    async def test_one_takes_what_was_let_go_of(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        assert not await journal.take("n", before=f"{ME}:1", owner=f"{ME}:2")
        await add(journal, 1, b"a", state=FREE)
        taken = await asyncio.gather(*(journal.take("n", before=f"{ME}:1", owner=f"{ME}:{n}") for n in range(2, 6)))
        assert taken.count(True) == 1

    async def test_a_former_owner_adds_nothing(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        await add(journal, 1, b"a", state=FREE)
        await claim(journal, f"{ME}:2")
        assert await add(journal, 2, b"b") is Appended.FENCED

    async def test_what_its_owner_let_go_with_is_written_also_when_others_have_gone_on(
        self, open_journal: Opener
    ) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        await add(journal, 1, b"a")
        await add(journal, 2, b"left", state=FREE)
        await claim(journal, f"{ME}:2")
        assert await add(journal, 2, b"left", state=FREE) is Appended.WRITTEN
        await add(journal, 3, b"c", owner=f"{ME}:2")
        assert await add(journal, 2, b"left", state=FREE) is Appended.WRITTEN
        assert [await add(journal, place, b"x", state=FREE) for place in (1, 3, 4)] == [Appended.FENCED] * 3
        assert await add(journal, 2, b"left", owner=f"{ME}:3", state=FREE) is Appended.FENCED

    async def test_what_is_void_can_be_read_until_it_is_claimed_and_begun_anew(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        await add(journal, 1, b"a")
        assert await add(journal, 2, b"why", state=VOID) is Appended.WRITTEN
        assert not await journal.take("n", before=f"{ME}:1", owner=f"{ME}:2")
        found = await journal.news("n", after=1, within=0)
        assert found == News(state=VOID, owner=f"{ME}:1", alive=False, born=f"{ME}:1", log=[b"why"])
        assert (await claim(journal, f"{ME}:2", fingerprint="g")).standing is Standing.MISMATCH
        anew = await claim(journal, f"{ME}:2")
        assert anew == Claim(standing=Standing.OWNED, number=f"of-{ME}:2", created=7, born=f"{ME}:2")
        # Its owner may not have heard that it was written.
        assert await add(journal, 2, b"why", state=VOID) is Appended.WRITTEN
        assert await add(journal, 1, b"b", owner=f"{ME}:2") is Appended.WRITTEN
        assert (await claim(journal, f"{ME}:3")).log == [b"b"]

    async def test_an_owner_begins_the_log_anew_under_the_same_number(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        assert await add(journal, 1, b"x" * 3000, state=FREE) is Appended.WRITTEN
        assert not await journal.restart("n", owner=f"{ME}:1")
        await claim(journal, f"{ME}:2")
        assert not await journal.restart("n", owner=f"{ME}:1")
        assert await journal.restart("n", owner=f"{ME}:2")
        # There is room for as much again.
        assert await add(journal, 1, b"y" * 3000, owner=f"{ME}:2", state=DONE) is Appended.WRITTEN
        found = await claim(journal, f"{ME}:3")
        assert (found.number, found.born, found.log) == (f"of-{ME}:1", f"{ME}:2", [b"y" * 3000])

    async def test_who_waits_hears_of_news_at_once(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        assert not await journal.wanted("n")
        waiting = asyncio.create_task(journal.news("n", after=0, within=5))
        async with asyncio.timeout(5):
            while not await journal.wanted("n"):
                await asyncio.sleep(0.005)
            await add(journal, 1, b"a")
            found = await waiting
        assert found is not None
        assert found.log == [b"a"]

    async def test_who_waits_is_told_in_time_that_there_is_nothing(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        found = await journal.news("n", after=0, within=0.02)
        assert (found is not None and found.alive, found and found.log) == (True, [])

    async def test_the_oldest_of_the_tenant_make_room(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        for number in range(1, 4):
            await claim(journal, f"{ME}:1", f"n{number}")
            await asyncio.sleep(0.002)
            await add(journal, 1, b"x" * 1024, name=f"n{number}", state=DONE)
        await claim(journal, f"{ME}:1", "other", tenant="other")
        there = [await journal.news(name, after=0, within=0) is not None for name in ("n1", "n2", "n3", "other")]
        assert there == [False, True, True, True]

    async def test_the_oldest_of_all_make_room(self, open_journal: Opener) -> None:
        journal = open_journal(ME, Limits(keep_s=9, open_s=9, tenant_bytes=4096, total_bytes=4096))
        for number in range(1, 4):
            await claim(journal, f"{ME}:1", f"n{number}", tenant=f"t{number}")
            await asyncio.sleep(0.002)
            await add(journal, 1, b"x" * 1024, name=f"n{number}", state=DONE)
        there = [await journal.news(f"n{number}", after=0, within=0) is not None for number in range(1, 4)]
        assert there == [False, True, True]

    async def test_an_answer_that_is_too_large_is_not_kept(self, open_journal: Opener) -> None:
        journal = open_journal(ME, LIMITS)
        await claim(journal, f"{ME}:1")
        assert await add(journal, 1, b"x" * 5000) is Appended.GONE
        assert await add(journal, 2) is Appended.GONE
        assert await journal.news("n", after=0, within=0) is None

    async def test_an_answer_is_kept_for_its_time(self, open_journal: Opener) -> None:
        journal = open_journal(ME, Limits(keep_s=0.05, open_s=60, tenant_bytes=4096, total_bytes=4096))
        await claim(journal, f"{ME}:1")
        await asyncio.sleep(0.06)
        assert await add(journal, 1, state=DONE) is Appended.WRITTEN
        assert (await claim(journal, f"{ME}:2")).standing is Standing.DONE
        await asyncio.sleep(0.06)
        assert (await claim(journal, f"{ME}:3")).standing is Standing.OWNED
