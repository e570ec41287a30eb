"""A stream of examples, each posted until it is acknowledged."""
import itertools
import random
import threading
import time

from daemon import chat
from harness import Failed, require
from place import answered

BACKLOG = 12                # examples that wait to be trained: a kill always finds work, and the end is near
PLACES = ("by the lake", "in the tower", "under the bridge", "on the moon", "behind the mill", "at the ferry", "nowhere")


def lesson(number):
    """Example `number`, the same in every run."""
    who, where = ("Mira", "Max", "Lena", "Otto", "Vera")[number % 5], PLACES[number % len(PLACES)]
    return chat(f"Where is {who}? ({number})", f"{who} is {where}.")


class Poster(threading.Thread):
    """Posts examples one by one, each until it is acknowledged, and keeps some waiting."""

    def __init__(self, place, seed):
        super().__init__(daemon=True)
        self.place, self.plan, self.key = place, random.Random(seed), f"soak-{seed}"
        self.ids, self.again, self.ending, self.failed = [], 0, threading.Event(), None
        self.trained = 0        # as far as the soak knows
        self.start()

    def run(self):
        try:
            for number in itertools.count():
                while len(self.ids) - self.trained >= BACKLOG and not self.ending.is_set():
                    time.sleep(0.002)
                if self.ending.is_set():
                    return
                self.ids.append(self.post(number))
                time.sleep(self.plan.random() * 0.004)
        except Exception as error:
            self.failed = error

    def post(self, number):
        for attempt in itertools.count():
            key = {"idempotency-key": f"{self.key}-{number}"}
            answer = answered(f"{self.place.daemon.base}/v1/examples", lesson(number), key)
            if answer and answer[0] == 202:
                self.again += bool(attempt)
                return answer[1]["accepted"][0]["id"]
            require(answer is None or answer[0] in (429, 503), f"POST of example {number} answered {answer}")
            time.sleep(0.005)

    def finish(self):
        """Stop posting. Returns the ids of everything that was acknowledged, in order."""
        self.ending.set()
        self.join(60)
        if self.failed or self.is_alive():
            raise Failed(f"posting failed: {self.failed or 'no end'}")
        return self.ids
