//! Steps of the engine, and the pauses between them that a trainer may ask for.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lets steps through, except while it is held.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Steps that run now.
    running: usize,
    /// Somebody waits for them to end; no other may begin.
    wanted: bool,
    held_until: Option<Instant>,
}

/// A step that runs.
pub struct Step<'a>(&'a Gate);

impl Gate {
    /// Begins a step, as soon as the gate is not held.
    pub fn step(&self) -> Step<'_> {
        let mut state = self.lock();
        loop {
            let left = state.held_until.map(|until| until.saturating_duration_since(Instant::now()));
            state = match left {
                Some(left) if !left.is_zero() => self.wait(state, left),
                _ if state.wanted => self.wait(state, Duration::from_secs(1)),
                _ => break,
            };
        }
        state.running += 1;
        Step(self)
    }

    /// Waits for running steps to end, at most for `longest`, and lets none begin for that long. False if one still
    /// runs: nothing is held then.
    pub fn hold(&self, longest: Duration) -> bool {
        let deadline = Instant::now() + longest;
        let mut state = self.lock();
        state.wanted = true;
        while state.running > 0 && Instant::now() < deadline {
            state = self.wait(state, deadline.saturating_duration_since(Instant::now()));
        }
        state.wanted = false;
        let held = state.running == 0;
        state.held_until = held.then(|| Instant::now() + longest);
        self.changed.notify_all();
        held
    }

    /// Lets steps begin again. False if they could already, because the time of the hold had passed.
    pub fn release(&self) -> bool {
        let until = self.lock().held_until.take();
        self.changed.notify_all();
        until.is_some_and(|until| Instant::now() < until)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, longest: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, longest).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_waits_for_the_running_step_and_keeps_the_next_one_out() {
        let gate = Gate::default();
        let running = gate.step();
        assert!(!gate.hold(Duration::from_millis(20)), "the step did not end");
        std::thread::scope(|scope| {
            let holding = scope.spawn(|| gate.hold(Duration::from_secs(60)));
            std::thread::sleep(Duration::from_millis(20));
            drop(running);
            assert!(holding.join().unwrap());
            let next = scope.spawn(|| (drop(gate.step()), Instant::now()).1);
            std::thread::sleep(Duration::from_millis(50));
            let released = Instant::now();
            assert!(gate.release());
            assert!(next.join().unwrap() >= released, "a step began while the gate was held");
        });
        assert!(!gate.release(), "nothing was held");
    }

    #[test]
    fn a_hold_ends_by_itself() {
        let gate = Gate::default();
        assert!(gate.hold(Duration::from_millis(20)));
        let waited = Instant::now();
        drop(gate.step());
        assert!(waited.elapsed() < Duration::from_secs(5));
        assert!(!gate.release());
    }
}
