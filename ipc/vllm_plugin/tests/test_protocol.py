import itertools
import os
import resource
import socket
import stat
import tempfile
import threading
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import apollod.gate
import apollod.server
from apollod.errors import ExportError
from apollod.gate import Gate
from apollod.server import REQUEST_BYTES_MAX, Controls, WeightServer
from apollod.vllm_engine import EngineControl
from client import Client

MANIFEST = {"version": 1, "epoch": "0" * 32}


class Serving(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name, "weights.sock")
        self.gate = Gate()
        self.server = WeightServer(self.path)
        self.addCleanup(self.server.close)
        self.controls = Controls(
            invalidate=lambda how: how,
            hold=self.gate.hold,
            release=self.gate.release,
            score=lambda ids: [-float(token) for token in ids[1:]],
        )
        self.server.offer(MANIFEST, self.controls)

    def lease(self):
        client = Client(self.path)
        self.addCleanup(client.close)
        self.assertEqual(client.ask({"hello": 1}), MANIFEST)
        return client

    def lease_soon(self):
        """A lease, once the one before has been noticed to be over."""
        for _ in range(200):
            with Client(self.path) as client:
                if client.ask({"hello": 1}) == MANIFEST:
                    return
            time.sleep(0.01)
        self.fail("the lease was not given back")


class Lease(Serving):
    def test_the_socket_is_for_this_user_alone(self):
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)

    def test_a_second_trainer_is_refused_and_told_who_has_the_lease(self):
        self.lease()
        with Client(self.path) as second:
            self.assertEqual(second.ask({"hello": 1}), {"error": f"leased by pid {os.getpid()}"})
            self.assertIsNone(second.read())
        self.assertEqual(self.server.leased_by(), os.getpid())

    def test_the_lease_ends_with_the_connection(self):
        self.lease().close()
        self.lease_soon()

    def test_a_first_line_that_is_no_hello_ends_the_connection(self):
        for line, word in (
            (b'{"ping":1}\n', "say hello before ping"),
            (b'{"hello":2}\n', "version 2"),
            (b'{"hello":true}\n', "version True"),
            (b"\xff\xfe\n", "want"),
            (b"[" * 5000 + b"\n", "want"),
        ):
            with self.subTest(line=line[:20]), Client(self.path) as client:
                self.assertIn(word, client.send(line)["error"])
                self.assertIsNone(client.read())
        self.lease()

    def test_a_ping_is_answered_with_its_number_and_the_epoch(self):
        self.assertEqual(self.lease().ask({"ping": 7}), {"pong": 7, "epoch": "0" * 32})

    def test_garbage_is_answered_and_the_lease_stays(self):
        client = self.lease()
        for line in (b"\n", b"garbage\n", b"[1]\n", b"{}\n", b'{"ping":1,"hold":1}\n', b'{"shutdown":1}\n',
                     b'{"ping":-1}\n', b'{"ping":true}\n', b'{"hold":0}\n', b'{"hold":1e3}\n', b'{"hold":9999999999}\n',
                     b'{"invalidate":"all"}\n', b'{"release":1}\n', b'{"score":[]}\n', b'{"score":["a"]}\n',
                     b"[" * 5000 + b"\n", b"\xff\n"):
            with self.subTest(line=line[:20]):
                self.assertEqual(list(client.send(line)), ["error"])
        self.assertEqual(client.ask({"ping": 1})["pong"], 1)

    def test_a_line_that_is_too_long_ends_the_connection(self):
        client = self.lease()
        self.assertIn("at most", client.send(b"x" * REQUEST_BYTES_MAX)["error"])
        client.close()
        self.lease_soon()

    def test_what_is_not_offered_cannot_be_asked_for(self):
        self.server.offer(MANIFEST, Controls())
        client = self.lease()
        for request in ({"hold": 1}, {"release": True}, {"invalidate": "salt"}, {"score": [1, 2]}):
            self.assertIn("cannot", client.ask(request)["error"])

    def test_a_score_and_an_invalidation_are_answered(self):
        client = self.lease()
        self.assertEqual(client.ask({"score": [5, 17, 3]}), {"logprobs": [-17.0, -3.0]})
        self.assertEqual(client.ask({"invalidate": "reset"}), {"invalidated": "reset"})

    def test_a_failing_score_is_an_error_and_the_lease_stays(self):
        def fails(ids):
            raise IndexError("index out of range")

        self.server.offer(MANIFEST, Controls(score=fails))
        client = self.lease()
        self.assertEqual(client.ask({"score": [1]}), {"error": "index out of range"})
        self.server.withdraw("")

    def test_a_score_that_is_not_finite_is_no_broken_json(self):
        self.server.offer(MANIFEST, Controls(score=lambda ids: [float("nan")]))
        self.assertEqual(list(self.lease().ask({"score": [1, 2]})), ["error"])


class Withdrawal(Serving):
    def test_it_ends_the_lease_before_another_load_is_offered(self):
        client = self.lease()
        started = time.monotonic()
        ended = threading.Thread(target=self.server.withdraw, args=("reloading",))
        ended.start()
        self.assertIsNone(client.read())
        client.close()
        ended.join()
        self.assertLess(time.monotonic() - started, apollod.server.GOODBYE_S)
        with Client(self.path) as next_client:
            self.assertEqual(next_client.ask({"hello": 1}), {"error": "reloading"})
        self.server.offer({**MANIFEST, "epoch": "1" * 32}, self.controls)
        with Client(self.path) as next_client:
            self.assertEqual(next_client.ask({"hello": 1})["epoch"], "1" * 32)

    def test_a_trainer_that_does_not_go_is_cut_off(self):
        client = self.lease()
        self.server.withdraw("reloading")
        self.assertIsNone(client.read())
        self.assertIsNone(self.server.leased_by())

    def test_closing_ends_the_connection_and_removes_the_socket(self):
        client = self.lease()
        threading.Timer(0.1, client.close).start()
        self.server.close()
        self.server.close()
        self.assertFalse(self.path.exists())

    def test_closing_in_a_forked_child_leaves_the_parents_socket_and_lease(self):
        client = self.lease()
        child = os.fork()
        if child == 0:
            try:
                self.server.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        self.assertEqual(client.ask({"ping": 1})["pong"], 1)
        client.close()
        self.lease_soon()

    def assert_stale_weights_end_the_lease_at(self, request):
        why = None
        self.server.offer(MANIFEST, self.controls, lambda: why)
        client = self.lease()
        self.assertEqual(list(client.ask({"ping": 1})), ["pong", "epoch"])
        why = "moved"
        self.assertIsNone(client.ask(request))
        with Client(self.path) as second:
            self.assertEqual(second.ask({"hello": 1}), {"error": "moved"})

    def test_stale_weights_end_the_lease_at_a_ping(self):
        self.assert_stale_weights_end_the_lease_at({"ping": 1})

    def test_stale_weights_end_the_lease_at_a_score(self):
        self.assert_stale_weights_end_the_lease_at({"score": [1, 2]})


class Exhaustion(Serving):
    def test_a_moment_without_descriptors_does_not_end_the_service(self):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        held = []
        with self.assertRaises(OSError):
            while True:
                held.append(os.dup(0))
        for client in clients:
            client.connect(str(self.path))
        time.sleep(0.2)
        for descriptor in held:
            os.close(descriptor)
        for client in clients:
            client.close()
        self.lease()


class SocketPath(Serving):
    def test_the_socket_of_a_living_server_is_not_taken(self):
        with self.assertRaisesRegex(ExportError, "another program serves"):
            WeightServer(self.path)
        self.lease()

    def test_the_socket_of_a_dead_server_is_replaced(self):
        stale = self.path.with_name("stale.sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(stale))
        fresh = WeightServer(stale)
        self.addCleanup(fresh.close)
        fresh.offer(MANIFEST, Controls())
        with Client(stale) as client:
            self.assertEqual(client.ask({"hello": 1}), MANIFEST)

    def test_a_file_is_not_taken_for_a_socket(self):
        file = self.path.with_name("file")
        file.write_text("precious")
        with self.assertRaisesRegex(ExportError, "something else"):
            WeightServer(file)
        self.assertEqual(file.read_text(), "precious")

    def test_a_path_that_is_too_long_is_refused(self):
        with self.assertRaisesRegex(ExportError, "at most 107"):
            WeightServer("/tmp/" + "x" * 120)


class Hold(Serving):
    """An engine that steps all the time, in a thread."""

    def setUp(self):
        super().setUp()
        self.steps = 0
        self.step_s = 0.001
        self.running = True
        engine = threading.Thread(target=self.run_engine)
        engine.start()
        self.addCleanup(engine.join)
        self.addCleanup(setattr, self, "running", False)

    def run_engine(self):
        while self.running:
            with self.gate.step(), self.gate.step():
                time.sleep(self.step_s)
                self.steps += 1

    def steps_in(self, seconds):
        before = self.steps
        time.sleep(seconds)
        return self.steps - before

    def assert_steps(self):
        """It steps again, on a busy machine too."""
        before, end = self.steps, time.monotonic() + 10
        while self.steps == before:
            self.assertLess(time.monotonic(), end, "the engine is still held")
            time.sleep(0.005)

    def test_it_stops_the_engine_until_the_release(self):
        client = self.lease()
        self.assertEqual(client.ask({"hold": 5000}), {"held": True})
        self.assertEqual(self.steps_in(0.1), 0)
        self.assertEqual(client.ask({"invalidate": "salt"}), {"invalidated": "salt"})
        self.assertEqual(client.ask({"ping": 1})["pong"], 1)
        self.assertEqual(self.steps_in(0.05), 0)
        self.assertEqual(client.ask({"release": True}), {"released": True})
        self.assert_steps()

    def test_it_ends_by_itself_and_the_release_says_so(self):
        client = self.lease()
        self.assertEqual(client.ask({"hold": 100}), {"held": True})
        time.sleep(0.1)
        self.assert_steps()
        self.assertEqual(client.ask({"release": True}), {"released": False})

    def test_it_ends_with_the_connection(self):
        client = self.lease()
        self.assertEqual(client.ask({"hold": 60_000}), {"held": True})
        client.close()
        time.sleep(0.1)
        self.assert_steps()

    def test_it_ends_when_the_weights_are_withdrawn(self):
        client = self.lease()
        self.assertEqual(client.ask({"hold": 60_000}), {"held": True})
        threading.Timer(0.05, client.close).start()
        self.server.withdraw("reloading")
        self.assert_steps()

    def test_it_is_refused_when_the_step_takes_longer(self):
        client = self.lease()
        self.step_s = 0.5
        time.sleep(0.1)
        self.assertEqual(client.ask({"hold": 20}), {"held": False})
        self.step_s = 0.001
        time.sleep(0.6)
        self.assert_steps()

    def test_it_is_refused_when_what_a_step_left_running_takes_longer(self):
        self.assertFalse(self.gate.hold(0.05, lambda: time.sleep(0.1)))
        self.assert_steps()

    def test_it_ends_though_its_time_passes_between_two_looks_at_the_clock(self):
        gate = Gate()
        # Two looks by the hold, one by the step; then its time is over.
        looks = itertools.chain([0, 0, 0], itertools.repeat(1))
        with mock.patch.object(apollod.gate, "time", SimpleNamespace(monotonic=lambda: next(looks))):
            self.assertTrue(gate.hold(0.1))
            engine = threading.Thread(target=lambda: gate.step().__enter__(), daemon=True)
            engine.start()
            engine.join(5)
        self.assertFalse(engine.is_alive(), "the engine waits for a hold that is over")

    def test_whoever_asks_gets_in_before_the_next_step_and_the_engine_waits(self):
        for _ in range(20):
            with self.gate.between(5) as inside:
                self.assertTrue(inside)
                self.assertEqual(self.steps_in(0.01), 0)

    def test_an_idle_engine_is_held_at_once(self):
        self.running = False
        time.sleep(0.05)
        self.assertEqual(self.lease().ask({"hold": 1000}), {"held": True})


class Busy(unittest.TestCase):
    def test_an_invalidation_is_answered_before_the_trainer_gives_up(self):
        stepping, end = threading.Event(), threading.Event()

        class Engine:
            def step(self):
                stepping.set()
                end.wait()

            def preprocess_add_request(self, request):
                return request

        engine = Engine()
        controls = EngineControl(engine).controls
        thread = threading.Thread(target=engine.step)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(end.set)
        stepping.wait()
        started = time.monotonic()
        self.assertEqual(controls.invalidate("reset"), "salt")
        self.assertLess(time.monotonic() - started, 4, "a trainer waits 5 s")


if __name__ == "__main__":
    unittest.main()
