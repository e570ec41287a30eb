//! Steps in flight (HOGWILD): workers compute them side by side, one at a time writes what they computed.
//!
//! Each worker has threads, keys and values of its own and reads live weights without a lock, also while an update is
//! written: it sees old or new elements, never halves of one. Updates are made in the order of the steps, by
//! whichever worker is free when the next one can be made, so that cursor, queue and generations mean the same with
//! any number of workers. No more steps are begun and not applied than there are workers; so a step rests on weights
//! that lack `workers - 1` updates at most, and no more factors than that are held.
//!
//! The lock of [`Line`] guards the order alone and is held for moments; that of the session, for each update.

use super::session::Session;
use crate::backend::Backend;
use crate::protocol::{FromTrainer, Work};
use anyhow::{Context, Result, bail};
use apollo::Gradients;
use ipc::Attachment;
use model::{Cache, Example, Extent, Model, Report, Timings};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A step as it was asked for.
pub struct Step {
    /// Its number.
    pub number: u64,
    /// Replaces `train.lr`.
    pub lr: Option<f32>,
    /// Its examples.
    pub work: Vec<Work>,
}

/// What a step's examples came to, before any update.
pub struct Computed<D: Backend> {
    /// The step's gradient.
    pub gradients: Gradients<D>,
    /// One per example.
    pub reports: Vec<Report>,
    /// Where the time went.
    pub timings: Timings,
}

/// A step that was taken to be computed.
struct Begun {
    step: Step,
    place: u64,
    moves: Moves,
}

/// What has happened to the weights so far.
#[derive(Clone, Copy, Default)]
struct Moves {
    /// Updates by steps.
    updates: u64,
    /// Times that all keys and values of before were to be forgotten.
    forgotten: u64,
}

/// A step that was computed, or could not be.
pub struct Done<D: Backend> {
    /// The step.
    pub step: Step,
    /// What came of it.
    pub computed: Result<Computed<D>>,
    /// Updates between its first look at the weights and now.
    pub staleness: u64,
}

/// The steps in their order.
pub struct Line<D: Backend> {
    state: Mutex<State<D>>,
    changed: Condvar,
    /// Steps that may be begun and not applied.
    most: u64,
}

struct State<D: Backend> {
    waiting: VecDeque<Step>,
    /// Steps that were begun, and that were applied: numbers of the next places.
    begun: u64,
    applied: u64,
    /// By place, with the updates when it was begun.
    computed: BTreeMap<u64, (Done<D>, u64)>,
    applying: bool,
    moves: Moves,
    closed: bool,
}

impl<D: Backend> Line<D> {
    /// An empty line of that many workers.
    pub fn new(workers: usize) -> Line<D> {
        let (waiting, computed, moves) = (VecDeque::new(), BTreeMap::new(), Moves::default());
        let state = State { waiting, begun: 0, applied: 0, computed, applying: false, moves, closed: false };
        Line { state: Mutex::new(state), changed: Condvar::new(), most: workers as u64 }
    }

    fn lock(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a step.
    pub fn push(&self, step: Step) {
        self.lock().waiting.push_back(step);
        self.changed.notify_all();
    }

    /// Whether every step was applied.
    pub fn is_empty(&self) -> bool {
        let state = self.lock();
        state.waiting.is_empty() && state.applied == state.begun
    }

    /// Makes every worker forget its keys and values before its next step.
    pub fn forget(&self) {
        self.lock().moves.forgotten += 1;
    }

    /// No step is begun or applied from now on.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// The next step to compute, waited for; `None` once the line is closed.
    fn begin(&self) -> Option<Begun> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if state.begun - state.applied < self.most
                && let Some(step) = state.waiting.pop_front()
            {
                let (place, moves) = (state.begun, state.moves);
                state.begun += 1;
                return Some(Begun { step, place, moves });
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn hand_over(&self, place: u64, step: Step, computed: Result<Computed<D>>, moves: Moves) {
        let done = Done { step, computed, staleness: 0 };
        self.lock().computed.insert(place, (done, moves.updates));
    }

    /// The next step to apply, if it is there and nobody applies another: the caller does.
    fn next_to_apply(&self) -> Option<Done<D>> {
        let mut state = self.lock();
        if state.closed || state.applying {
            return None;
        }
        let place = state.applied;
        let (done, updates) = state.computed.remove(&place)?;
        state.applying = true;
        Some(Done { staleness: state.moves.updates - updates, ..done })
    }

    /// The caller has applied it; `moved` says whether weights did. It is said before another step can be applied, so that
    /// answers come in the order of the steps, and after this one has left the line, so that whoever hears it finds it gone.
    fn applied(&self, moved: bool, say: impl FnOnce()) {
        let mut state = self.lock();
        (state.applying, state.applied) = (false, state.applied + 1);
        state.moves.updates += u64::from(moved);
        say();
        drop(state);
        self.changed.notify_all();
    }
}

/// What computes steps, one after the other.
pub struct Worker<D: Backend> {
    pub device: Arc<D>,
    pub attachment: Arc<Attachment>,
    pub model: Arc<Model<D>>,
    pub cache: Cache<D>,
    pub extent: Extent,
    /// Which tensors train.
    pub wanted: Vec<bool>,
}

impl<D: Backend> Worker<D> {
    /// Works until the line is closed; `say` gets the answer to each step that this worker applies.
    pub fn run(mut self, line: &Line<D>, session: &Mutex<Session<D>>, say: impl Fn(FromTrainer)) {
        let mut seen = Moves::default();
        while let Some(Begun { step, place, moves }) = line.begin() {
            (seen.updates..moves.updates).for_each(|_| self.cache.weights_moved());
            if moves.forgotten > seen.forgotten {
                self.cache.forget();
            }
            seen = moves;
            let computed = self.compute(&step.work);
            line.hand_over(place, step, computed, moves);
            while let Some(done) = line.next_to_apply() {
                let answer = session.lock().unwrap_or_else(PoisonError::into_inner).apply(&*self.device, done);
                if let FromTrainer::ServerGone { .. } = answer {
                    line.close();
                    say(answer);
                } else {
                    let moved = matches!(&answer, FromTrainer::Trained(trained) if trained.skipped.is_none());
                    line.applied(moved, || say(answer));
                }
            }
        }
    }

    /// All examples forward and backward.
    fn compute(&mut self, work: &[Work]) -> Result<Computed<D>> {
        if work.is_empty() {
            bail!("a step without examples");
        }
        self.attachment.check()?;
        let examples = work.iter().map(|w| self.example(w)).collect::<Result<Vec<_>>>()?;
        let mut gradients = Gradients::new(self.wanted.clone());
        let mut timings = Timings::default();
        // What examples of one step may share is what each of them leaves here, and what is kept.
        self.cache.clear();
        let reports = self.device.run(|| {
            // Loss of the step: Σ_i w_i Σ_tokens / Σ_i w_i·tokens_i. With one example the weight cancels
            // out there and multiplies lr instead, to which APOLLO does listen.
            let total: f32 = work.iter().zip(&examples).map(|(w, e)| w.weight * e.tokens() as f32).sum();
            let train = |(w, e): (&Work, &Example)| {
                let (scale, cache) = (w.weight / total, &mut self.cache);
                self.model.train(cache, e, self.extent, scale, &mut gradients, &mut timings)
            };
            work.iter().zip(&examples).map(train).collect()
        });
        Ok(Computed { gradients, reports, timings })
    }

    fn example(&self, work: &Work) -> Result<Example> {
        let example = Example::new(work.ids.clone(), work.spans.clone());
        let checked = example.and_then(|e| self.model.check(&e).map(|()| e));
        checked.with_context(|| format!("example {}", work.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use compute::Cpu;
    use std::time::Duration;

    #[test]
    fn answers_come_in_the_order_of_the_steps_however_slowly_the_first_is_said() {
        let (line, said) = (Line::<Cpu>::new(2), Mutex::new(Vec::new()));
        (1..=2).for_each(|number| line.push(Step { number, lr: None, work: Vec::new() }));
        let begun: Vec<Begun> = (0..2).map_while(|_| line.begin()).collect();
        for Begun { step, place, moves } in begun {
            line.hand_over(place, step, Err(anyhow::anyhow!("not computed")), moves);
        }
        let apply = || {
            let done = std::iter::repeat_with(|| line.next_to_apply()).flatten().next().expect("both are there");
            line.applied(true, || {
                if done.step.number == 1 {
                    std::thread::sleep(Duration::from_millis(100));
                }
                said.lock().expect("nobody panics").push((done.step.number, done.staleness));
            });
        };
        std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(apply))));
        assert_eq!(*said.lock().expect("nobody panics"), [(1, 0), (2, 1)]);
        assert!(line.is_empty());
    }
}
