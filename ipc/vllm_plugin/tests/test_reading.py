"""A model directory that is loaded while others write into it."""

import fcntl
import multiprocessing
import os
import tempfile
import threading
import time
import unittest
from pathlib import Path

import apollod


class Reading(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.model = Path(folder.name)
        self.folder = self.model / ".apollod"

    def opened(self) -> None:
        """As a trainer leaves it."""
        (self.folder / "generations").mkdir(parents=True)
        (self.folder / "generations" / "0.json").touch()
        (self.folder / "readers").touch()

    def writer(self) -> int:
        lock = os.open(self.folder / "readers", os.O_RDWR | os.O_CLOEXEC)
        self.addCleanup(os.close, lock)
        return lock

    def may_write(self, lock: int) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(lock, fcntl.LOCK_UN)
        return True

    def test_a_writer_is_kept_out_until_all_readers_are_done(self) -> None:
        self.opened()
        lock = self.writer()
        with apollod.reading(self.model), apollod.reading(str(self.model)):
            self.assertFalse(self.may_write(lock))
        self.assertTrue(self.may_write(lock))
        with self.assertRaises(ZeroDivisionError), apollod.reading(self.model):
            1 / 0  # noqa: B018
        self.assertTrue(self.may_write(lock))

    def test_a_child_that_was_forked_meanwhile_does_not_keep_the_lock(self) -> None:
        self.opened()
        lock = self.writer()
        ended = multiprocessing.get_context("fork").Event()
        with apollod.reading(self.model):
            child = multiprocessing.get_context("fork").Process(target=ended.wait, args=(30,))
            child.start()
        try:
            self.assertTrue(self.may_write(lock))
        finally:
            ended.set()
            child.join()

    def test_a_reader_waits_for_a_sync(self) -> None:
        self.opened()
        lock = self.writer()
        fcntl.flock(lock, fcntl.LOCK_EX)
        for journal in (False, True):  # A sync that has not written anything yet, and one that has.
            if journal:
                (self.folder / "journal").touch()
            with self.assertRaisesRegex(apollod.TornModelError, "has not ended"), apollod.reading(self.model, wait=0.2):
                self.fail("read during a sync")

        def end_of_sync() -> None:
            time.sleep(0.3)
            (self.folder / "journal").unlink()
            fcntl.flock(lock, fcntl.LOCK_UN)

        sync = threading.Thread(target=end_of_sync)
        sync.start()
        with apollod.reading(self.model):
            self.assertFalse((self.folder / "journal").exists())
        sync.join()

    def test_what_a_crash_left_is_not_loaded(self) -> None:
        self.opened()
        (self.folder / "journal").touch()
        recover = f"apollod checkpoint recover {self.model}"
        with self.assertRaisesRegex(apollod.TornModelError, recover), apollod.reading(self.model, wait=0.2):
            self.fail("read what is torn")
        (self.folder / "journal").unlink()
        with apollod.reading(self.model):
            pass

    def test_a_reader_writes_nothing_and_notices_what_others_write(self) -> None:
        with apollod.reading(self.model):
            self.assertEqual(list(self.model.iterdir()), [])
            self.opened()
        (self.folder / "readers").unlink()
        with self.assertRaisesRegex(apollod.TornModelError, "load it again"), apollod.reading(self.model):
            (self.folder / "generations" / "1.json").touch()
        with self.assertRaisesRegex(apollod.TornModelError, "load it again"), apollod.reading(self.model):
            (self.folder / "journal").touch()

    def test_a_name_on_a_hub_is_not_locked(self) -> None:
        with apollod.reading("organisation/model"):
            pass


if __name__ == "__main__":
    unittest.main()
