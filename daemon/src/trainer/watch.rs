//! The end of this process when the server is gone, or when it cannot go on by itself.
//!
//! Writing must stop at once, in the middle of a step or of its writes too, and a loop in a thread pool cannot be
//! stopped from outside: so the process ends. That is safe at any moment. Live weights are restored or loaded anew
//! before anything is trained again (DESIGN.md, T5), and a sync works on its journal: it is cut off as well, because
//! a server that ended the connection may load other weights into the same memory, which must not reach the files.

use crate::protocol::{self, FromTrainer};
use anyhow::{Context, Result};
use ipc::Attachment;
use std::io::stdout;
use std::sync::Arc;
use std::time::Duration;

/// How often a live copy is looked at anew, whose server may come later.
const LOOK: Duration = Duration::from_millis(200);

/// How long the last word may take.
const LAST_WORD: Duration = Duration::from_millis(50);

/// The status that a panic ends a process with.
const PANICKED: i32 = 101;

/// Starts a thread that sleeps until the server's process or its connection ends, says so to the supervisor and ends
/// this process.
pub fn start(attachment: Arc<Attachment>) -> Result<()> {
    let watch = move || {
        let gone = loop {
            if let Err(gone) = attachment.watch(LOOK) {
                break gone;
            }
        };
        end_with(FromTrainer::ServerGone { reason: gone.to_string() }, 0)
    };
    std::thread::Builder::new().name("server-watch".into()).spawn(watch).context("cannot start a thread")?;
    Ok(())
}

/// Makes a panic of any thread the end of the process, and tells the supervisor why. Nothing is unwound: after an error of
/// a GPU whatever a destructor asks of it fails too, and a thread less is no trainer any more.
pub fn end_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        let reason = panic.payload_as_str().unwrap_or("a panic without words").to_owned();
        end_with(FromTrainer::Dying { reason }, PANICKED)
    }));
}

/// Says a last word and ends the process with this status.
fn end_with(word: FromTrainer, status: i32) -> ! {
    // It has a thread of its own: a supervisor that does not read must not keep the writes going.
    let say = move || {
        // Held to the end, so that nothing follows it.
        let mut out = stdout().lock();
        // A supervisor that cannot be told sees the end of the process.
        let _ = protocol::send(&mut out, &word);
        exit(status)
    };
    if std::thread::Builder::new().spawn(say).is_ok() {
        std::thread::sleep(LAST_WORD);
    }
    exit(status)
}

fn exit(status: i32) -> ! {
    // SAFETY: `_exit` ends the process without running anything in it (no destructor, no exit handler), so no
    // state of this program can be seen afterwards.
    unsafe { libc::_exit(status) }
}
