//! When the server's prefix cache is invalidated: at once when weights move after a quiet time, and then once per
//! interval for as long as they move. Never when nothing moved, and not per step.

use ipc::Invalidation;
use std::time::{Duration, Instant};

/// The policy, and what it must remember. Who calls it keeps the clock.
pub struct PrefixCache {
    how: Option<Invalidation>,
    interval: Duration,
    /// Whether weights moved since the last invalidation that was done.
    moved: bool,
    /// The last one that was tried.
    last: Option<Instant>,
}

impl PrefixCache {
    /// `how` is `None` when nothing is to be done, or nothing can be.
    pub fn new(how: Option<Invalidation>, interval: Duration) -> PrefixCache {
        PrefixCache { how, interval, moved: false, last: None }
    }

    /// Weights have moved.
    pub fn moved(&mut self) {
        self.moved = true;
    }

    /// What is to be done now.
    pub fn due(&self, now: Instant) -> Option<Invalidation> {
        let rested = self.last.is_none_or(|last| now.saturating_duration_since(last) >= self.interval);
        self.pending().filter(|_| rested)
    }

    /// What is still to be done, however short ago the last time was: for the end of the process.
    pub fn pending(&self) -> Option<Invalidation> {
        self.how.filter(|_| self.moved)
    }

    /// Notes an attempt. One that failed is due again after the interval.
    pub fn tried(&mut self, now: Instant, done: bool) {
        self.last = Some(now);
        self.moved &= !done;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps and looks by a clock that only the test moves; when something was done, in ms.
    fn run(cache: &mut PrefixCache, moves_ms: &[u64], works: impl Fn(u64) -> bool) -> Vec<u64> {
        let start = Instant::now();
        let mut done = Vec::new();
        for ms in 0..60_000 {
            let now = start + Duration::from_millis(ms);
            if moves_ms.contains(&ms) {
                cache.moved();
            }
            if cache.due(now).is_some() {
                done.push(ms);
                cache.tried(now, works(ms));
            }
        }
        done
    }

    fn reset() -> PrefixCache {
        PrefixCache::new(Some(Invalidation::Reset), Duration::from_secs(10))
    }

    #[test]
    fn at_once_after_a_quiet_time_and_then_once_per_interval_while_weights_move() {
        assert_eq!(run(&mut reset(), &[], |_| true), Vec::<u64>::new(), "nothing moved");
        assert_eq!(run(&mut reset(), &[7], |_| true), [7]);
        let every_10_ms: Vec<u64> = (100..25_000).step_by(10).collect();
        assert_eq!(
            run(&mut reset(), &every_10_ms, |_| true),
            [100, 10_100, 20_100, 30_100],
            "the last move counts too"
        );
        assert_eq!(run(&mut reset(), &[100, 200, 40_000], |_| true), [100, 10_100, 40_000]);
    }

    #[test]
    fn what_failed_is_tried_again_after_the_interval() {
        assert_eq!(run(&mut reset(), &[5], |ms| ms > 15_000), [5, 10_005, 20_005]);
    }

    #[test]
    fn nothing_is_done_where_nothing_is_to_be_done() {
        assert_eq!(run(&mut PrefixCache::new(None, Duration::from_secs(1)), &[1, 2], |_| true), Vec::<u64>::new());
    }

    #[test]
    fn what_is_pending_can_be_done_before_its_time() {
        let mut cache = reset();
        let now = Instant::now();
        assert_eq!(cache.pending(), None);
        cache.moved();
        cache.tried(now, true);
        cache.moved();
        assert_eq!((cache.due(now), cache.pending()), (None, Some(Invalidation::Reset)));
    }
}
