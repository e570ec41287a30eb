//! Work in order on several threads: one makes jobs, some do them, one takes the results in the order of the jobs.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::error::{Error, Result};

/// Does two things side by side, or one after the other with one thread. The first's error comes first, but for that of a
/// failed sync of the second: after it nothing can be undone here.
pub(crate) fn both<A: Send, B>(
    threads: usize,
    first: impl FnOnce() -> Result<A> + Send,
    second: impl FnOnce() -> Result<B>,
) -> Result<(A, B)> {
    if threads <= 1 {
        return Ok((first()?, second()?));
    }
    thread::scope(|scope| {
        let first = scope.spawn(first);
        let second = second();
        let first = first.join().unwrap_or_else(|panic| resume_unwind(panic));
        match (first, second) {
            (Ok(first), Ok(second)) => Ok((first, second)),
            (Err(_), Err(error @ Error::Sync { .. })) | (Err(error), _) | (_, Err(error)) => Err(error),
        }
    })
}

/// Calls `first` with a function that hands items to `second`, which takes them in order on a thread of its own, one at a
/// time: whoever hands over waits until the one before is done. With one thread `second` is called at once. Both have ended
/// when this returns; an error of `second` is given to whoever hands over next.
pub(crate) fn behind<T: Send, R>(
    threads: usize,
    mut second: impl FnMut(T) -> Result<()> + Send,
    first: impl FnOnce(&mut (dyn FnMut(T) -> Result<()> + Send + '_)) -> Result<R>,
) -> Result<R> {
    if threads <= 1 {
        return first(&mut second);
    }
    thread::scope(|scope| {
        let (items, received) = sync_channel(0);
        let worker = scope.spawn(move || received.into_iter().try_for_each(second));
        let mut worker = Some(worker);
        let mut ended =
            || worker.take().map_or(Ok(()), |worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        // Nobody receives any more only where `second` has failed.
        let result = first(&mut |item| items.send(item).or_else(|_| ended()));
        drop(items);
        let ended = ended();
        let result = result?;
        ended.map(|()| result)
    })
}

/// Jobs that are under way at once: what two threads need to go on while whoever takes the results waits for a disk. However
/// many threads there are, no more, so that memory does not grow with them, unless some would have nothing to do.
const IN_FLIGHT: usize = 64;
const IN_FLIGHT_PER_THREAD_MIN: usize = 2;

/// The three kinds of work.
pub(crate) struct Stages<Next, Do, Take> {
    /// Makes the next job, out of one that was done before where there is one; called on the caller's thread.
    pub(crate) next: Next,
    /// Makes a function that does jobs, one for each thread.
    pub(crate) worker: Do,
    /// Takes the results in order.
    pub(crate) take: Take,
}

/// Runs until there are no more jobs or one of the stages fails; `threads` do jobs. With one thread everything happens
/// on the caller's, one thing after the other. The first error in the order of the jobs is given.
pub(crate) fn run<Job, Done, Worker>(
    threads: usize,
    mut stages: Stages<
        impl FnMut(Option<Job>) -> Result<Option<Job>>,
        impl Fn() -> Worker + Sync,
        impl FnMut(Done) -> Result<()> + Send,
    >,
) -> Result<()>
where
    Job: Send,
    Done: Send,
    Worker: FnMut(&mut Job) -> Result<Done> + Send,
{
    if threads <= 1 {
        let (mut work, mut used) = ((stages.worker)(), None);
        while let Some(mut job) = (stages.next)(used.take())? {
            (stages.take)(work(&mut job)?)?;
            used = Some(job);
        }
        return Ok(());
    }
    let (jobs, todo) = sync_channel::<(usize, Job)>(threads);
    let (results, done) = channel::<Answer<Job, Done>>();
    let (free, used) = channel::<Option<Job>>();
    // Shared by the workers alone, so that it is closed when the last of them ends.
    let todo = Arc::new(Mutex::new(todo));
    for _ in 0..IN_FLIGHT.max(threads * IN_FLIGHT_PER_THREAD_MIN) {
        free.send(None).expect("the receiver is here");
    }
    thread::scope(|scope| {
        let taker = scope.spawn(move || take_in_order(&done, &free, &mut stages.take));
        for _ in 0..threads {
            let (todo, results, mut work) = (todo.clone(), results.clone(), (stages.worker)());
            scope.spawn(move || do_jobs(&todo, &results, &mut work));
        }
        drop((todo, results));
        let made = make_jobs(&jobs, &used, &mut stages.next);
        // Workers end when there is nothing more to come, and the taker after them.
        drop(jobs);
        let taken = taker.join().unwrap_or_else(|panic| resume_unwind(panic));
        taken.and(made)
    })
}

/// A job's number, itself, and what came of it, which may be a panic.
type Answer<Job, Done> = (usize, Job, thread::Result<Result<Done>>);

fn make_jobs<Job>(
    jobs: &SyncSender<(usize, Job)>,
    used: &Receiver<Option<Job>>,
    next: &mut impl FnMut(Option<Job>) -> Result<Option<Job>>,
) -> Result<()> {
    for number in 0.. {
        // Nobody is left to answer if a stage failed: its error is the one to report.
        let Ok(used) = used.recv() else { break };
        let Some(job) = next(used)? else { break };
        if jobs.send((number, job)).is_err() {
            break;
        }
    }
    Ok(())
}

fn do_jobs<Job, Done>(
    todo: &Mutex<Receiver<(usize, Job)>>,
    results: &Sender<Answer<Job, Done>>,
    work: &mut impl FnMut(&mut Job) -> Result<Done>,
) {
    loop {
        let job = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((number, mut job)) = job else { break };
        // After a panic nobody works on: the taker passes it on, and all stages end.
        let done = catch_unwind(AssertUnwindSafe(|| work(&mut job)));
        if results.send((number, job, done)).is_err() {
            break;
        }
    }
}

fn take_in_order<Job, Done>(
    done: &Receiver<Answer<Job, Done>>,
    free: &Sender<Option<Job>>,
    take: &mut impl FnMut(Done) -> Result<()>,
) -> Result<()> {
    let (mut waiting, mut next) = (BTreeMap::new(), 0);
    for (number, job, result) in done {
        waiting.insert(number, (job, result));
        while let Some((job, result)) = waiting.remove(&next) {
            take(result.unwrap_or_else(|panic| resume_unwind(panic))?)?;
            // The maker may have ended already.
            let _ = free.send(Some(job));
            next += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(number: usize) -> Error {
        Error::Unusable { reason: number.to_string() }
    }

    /// Squares 0..n on `threads`; the stage `fails` fails at number `at`.
    fn squares(threads: usize, n: usize, fails: &str, at: usize) -> (Result<()>, Vec<usize>) {
        let (mut made, mut taken) = (0, Vec::new());
        let stages = Stages {
            next: |_: Option<usize>| {
                made += 1;
                match made - 1 {
                    number if fails == "next" && number == at => Err(error(number)),
                    number => Ok((number < n).then_some(number)),
                }
            },
            worker: || {
                |job: &mut usize| match *job {
                    number if fails == "work" && number == at => Err(error(number)),
                    number => {
                        // Out of order as often as not.
                        thread::sleep(std::time::Duration::from_micros(number as u64 * 7919 % 100));
                        Ok(number * number)
                    }
                }
            },
            take: |square| {
                if fails == "take" && square == at * at {
                    return Err(error(at));
                }
                taken.push(square);
                Ok(())
            },
        };
        let result = run(threads, stages);
        (result, taken)
    }

    #[test]
    fn results_come_in_the_order_of_the_jobs() {
        for threads in [1, 2, 5] {
            let (result, taken) = squares(threads, 500, "", 0);
            result.unwrap();
            assert!(taken.iter().copied().eq((0..500).map(|n| n * n)), "{threads} threads");
        }
    }

    #[test]
    fn of_two_errors_a_failed_sync_is_told_and_else_the_first() {
        let sync = || Error::Sync { path: "file".into(), source: std::io::ErrorKind::Other.into() };
        let told = |first, second| both(2, || Err::<(), _>(first), || Err::<(), _>(second)).unwrap_err().to_string();
        assert_eq!(told(error(1), error(2)), error(1).to_string());
        assert_eq!(told(error(1), sync()), sync().to_string());
        assert_eq!(told(sync(), error(2)), sync().to_string());
    }

    /// Hands over 0..n, of which `second` fails at `at`; gives what came and what was taken.
    fn handed_over(threads: usize, n: usize, at: usize) -> (Result<usize>, Vec<usize>) {
        let mut taken = Vec::new();
        let second = |number| {
            if number == at {
                return Err(error(number));
            }
            taken.push(number);
            Ok(())
        };
        let result = behind(threads, second, |give| {
            (0..n).try_for_each(&mut *give)?;
            Ok(n)
        });
        (result, taken)
    }

    #[test]
    fn what_is_handed_over_is_taken_in_order_until_an_error_which_whoever_hands_over_is_told() {
        for threads in [1, 2] {
            let (result, taken) = handed_over(threads, 100, usize::MAX);
            assert_eq!(result.unwrap(), 100);
            assert!(taken.into_iter().eq(0..100));
            // The last one's is told at the end.
            for at in [0, 50, 99] {
                let (result, taken) = handed_over(threads, 100, at);
                assert_eq!(result.unwrap_err().to_string(), error(at).to_string());
                assert!(taken.into_iter().eq(0..at));
            }
        }
    }

    #[test]
    fn an_error_of_whoever_hands_over_comes_first_and_nothing_is_written_after_it_returned() {
        for threads in [1, 2] {
            let taken = std::sync::atomic::AtomicUsize::new(0);
            let second = |_| {
                thread::sleep(std::time::Duration::from_millis(20));
                taken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                if threads == 1 { Ok(()) } else { Err(error(2)) }
            };
            let first = |give: &mut (dyn FnMut(()) -> Result<()> + Send + '_)| {
                give(())?;
                Err::<(), _>(error(1))
            };
            assert_eq!(behind(threads, second, first).unwrap_err().to_string(), error(1).to_string());
            assert_eq!(taken.load(std::sync::atomic::Ordering::SeqCst), 1, "{threads} threads");
        }
    }

    #[test]
    fn a_panic_of_what_comes_behind_is_passed_on() {
        for threads in [1, 2] {
            let second = |number: usize| {
                assert!(number < 3, "second");
                Ok(())
            };
            let work = || behind(threads, second, |give| (0..9).try_for_each(&mut *give));
            let panic = catch_unwind(AssertUnwindSafe(work)).unwrap_err();
            assert_eq!(panic.downcast_ref(), Some(&"second"), "{threads} threads");
        }
    }

    #[test]
    fn a_panic_of_any_stage_ends_all_of_them() {
        for threads in [1, 2, 5] {
            for panics in ["next", "work", "take"] {
                let mut made = 0;
                let stages = Stages {
                    next: |_: Option<usize>| {
                        made += 1;
                        assert!(panics != "next" || made < 100, "next");
                        Ok((made < 500).then_some(made))
                    },
                    worker: || {
                        |job: &mut usize| {
                            assert!(panics != "work" || *job < 100, "work");
                            Ok(*job)
                        }
                    },
                    take: |job| {
                        assert!(panics != "take" || job < 100, "take");
                        Ok(())
                    },
                };
                let panic = catch_unwind(AssertUnwindSafe(|| run(threads, stages))).unwrap_err();
                assert_eq!(panic.downcast_ref(), Some(&panics), "{threads} threads");
            }
        }
    }

    #[test]
    fn an_error_of_any_stage_ends_all_of_them_and_nothing_after_it_is_taken() {
        for threads in [1, 2, 5] {
            for fails in ["next", "work", "take"] {
                for at in [0, 1, 100] {
                    let (result, taken) = squares(threads, 500, fails, at);
                    assert_eq!(result.unwrap_err().to_string(), error(at).to_string(), "{fails} {at}");
                    assert!(taken.len() <= at, "{fails} {at}: {}", taken.len());
                }
            }
        }
    }
}
