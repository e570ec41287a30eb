//! The model directory is the checkpoint: live weights go back into its safetensors files, in place.
//!
//! N, G: generation numbers (the base is 0) · block: 4096 bytes of a file, at multiples of 4096 ·
//! sector: 512 bytes, at multiples of 512 · chunk: 1 MiB, at multiples of 1 MiB, the unit of one record.
//!
//! A sync compares the live weights with the files and writes what differs: first how it differs into a journal, then
//! the blocks into the files with `pwrite` (never through a mapping), and then it publishes generation G. Whatever
//! happens in between, the next [`Checkpoint::open`] finds or makes exactly generation G-1 or exactly generation G.
//!
//! ```text
//! MODEL/.apollod/lock                 flock of the one writer; holds its process id
//! MODEL/.apollod/readers             flock of those who load the model (shared) and of a sync (exclusive)
//! MODEL/.apollod/journal              how the files lead back to G-1 while a sync writes G
//! MODEL/.apollod/state/G              optimizer state of generation G
//! MODEL/.apollod/sums/G               BLAKE3 of every 16 KiB of every tensor
//! MODEL/.apollod/generations/G.json   the published generation, sealed by a checksum of itself
//! MODEL/.apollod/history/G.delta      the retired journal of G; undoes G to get G-1
//! ```
//!
//! # The journal, byte by byte (all numbers little-endian)
//!
//! ```text
//! 0      8  "APOLJNL4"
//! frames, each:
//!   0    4  tag "HEAD" | "RECD" | "GENR"
//!   4    4  n, length of the body
//!   8    n  body
//!   8+n  8  XXH3-64 of (tag, length, body)
//! end   32  BLAKE3 of those 8 bytes of every frame, in order; the file ends here
//!
//! HEAD body: JSON {"generation": G, "previous": G-1, "shards": [{"file", "bytes"}, …]}   one, first
//! RECD body: one chunk of one tensor in which at least one block changed                any number
//!   0    2  shard, index into HEAD's shards
//!   2    1  width of an element in bytes: 1, 2 or 4
//!   3    1  0
//!   4    4  length of the piece in bytes (at most 1 MiB; it never crosses a chunk)
//!   8    8  offset of the piece in the file
//!  16   32  bitmap, bit k of byte k/8 (lowest first): block k of the chunk changed
//!  48   8s  XXH3-64 of the NEW content of each of the s sectors of the changed blocks
//!       …   z = zigzag(new - old) of every element, wrapping in its width, then of every byte after the last element,
//!           in the code of pack/mod.rs; where the width is 4, those are the lower 16 bits, and the upper follow
//! GENR body: the sealed JSON that generations/G.json will hold                          one, last
//! ```
//! Blocks and sectors at the ends of a tensor are cut to the tensor. `width` is 2 for 16-bit and 4 for
//! 32-bit elements whose tensor starts at a multiple of it in the file, otherwise 1, so that no element
//! ever crosses a sector.
//!
//! # Why deltas, and what a sector can be
//!
//! After training nearly every block of a trained matrix differs and each bf16 by a few ulps, so the
//! difference compresses to a tenth or a third where the new bytes, or the old, would hardly compress at all. The same
//! file is the undo of a crash and the undo that rollback needs.
//!
//! A crash leaves of each sector the old or the new content, or, of one that was under the head at that moment, the
//! beginning of one and the end of the other (`storage.rs` says what is assumed of a medium), or both in turn when the undo
//! was cut short there too. One checksum, of the new
//! content, tells which: if the content has it, it is new; if (content + difference) has it, it is old; adding a constant
//! is a bijection, so a checksum of the old content would say nothing more. A torn sector is found by trying every place
//! at which it can be torn. A sector that is nothing of that was changed by someone else or by a failing disk: the
//! recovery stops with the file, the tensor and the offset, and keeps the journal.
//!
//! Undo writes every changed block again even if it reads as old: after an fsync that failed, a page
//! may read as it was written, be marked clean, and not be on the disk. For the same reason a failed fsync is
//! never retried: the [`Checkpoint`] refuses further work and has to be opened again.
//!
//! # One sync
//!
//! 1. Write and sync `state/G`, beside the next step.
//! 2. Begin the journal. For each segment, some tens of MiB of changed blocks: append its records, fdatasync the journal
//!    (and fsync its folder, the first time), write its blocks into the shards, and ask the system to begin writing them
//!    out: beside the next segment's records. Meanwhile other threads compare and compress what comes next. After the last
//!    segment fdatasync every shard that was written.
//! 3. fsync the folder `state`; write and sync `sums/G` and its folder.
//! 4. Append the generation and the total checksum to the journal, fdatasync.
//! 5. Write `generations/G.json.tmp`, fdatasync, rename to `generations/G.json`, fsync the folder: **G is certain**.
//! 6. Rename the journal to `history/G.delta`, fsync both folders. Remove what is too old.
//!
//! Recovery looks at the newest published generation N and makes its name durable. A journal of N: step 6 is done again. A journal of N+1:
//! every record that is whole is undone, the shards are synced, every byte of the files is compared with N's
//! checksums, the journal is removed. A journal with a damaged head: no block can have been written, which is
//! not believed but compared, before it is removed. What belongs to no generation is removed.
//!
//! | crash | happens | found at the next open | becomes |
//! |---|---|---|---|
//! | 1 | in step 1, or while `sums/G` is written | files without a generation | removed; G-1 |
//! | 2 | before the first segment is durable | a journal, whole up to anywhere, or none | undone, though nothing was written; G-1 |
//! | 3 | while the blocks of a segment are written | journal whole up to that segment at least; each sector old, new or torn | undone; G-1 |
//! | 4 | while the next segment is appended | as 3, and torn records whose blocks were not written | undone up to there; G-1 |
//! | 5 | in step 3 or 4 | all blocks new, the journal whole or not | undone; G-1 |
//! | 6 | in step 5, before the name is durable | either name | undone, G-1; or G by case 7 |
//! | 7 | after it, before the journal is in the history | `G.json` and a journal of G | step 6; G |
//! | 8 | during the rename to `history/G.delta` | either name, or both | G |
//! | 9 | while old deltas, states and sums are removed | some of them are left | removed; G |
//! | 10 | inside recovery, anywhere | cases 3 to 9 again | as there |
//! | 11 | the journal is damaged before its end (a flipped bit, a disk that lied) | files that are not G-1 after the undo | refused with the tensor named; the journal is kept |
//!
//! An error in steps 1 to 4 that is not of an fsync is undone at once, and the handle goes on at G-1.
//!
//! A redo log would keep the files untouched until all is journalled, and finish a sync that a crash cut short.
//! But then nothing can be written while there is still something to compress, and a sync of everything takes as long as
//! both together. What undo gives up is one sync's work, which the queue trains again.
//!
//! # What a sync reads
//!
//! Live weights on a GPU are hashed there, block by block, and a sync reads the blocks whose hash differs from that
//! of the last sync ([`LiveWeights::block_hashes`], `known.rs`). Live weights in the machine's memory cost as much to hash
//! as to compare; of them a sync reads what was written since the last one ([`LiveWeights::written`]). Where neither is
//! known everything is read. What is read is compared with the file byte by byte, by the thread that has just read both,
//! in pieces that stay in its core's cache.
//!
//! Nobody reads a journal or a state soon: as soon as their pages are on the disk the page cache gives them back, because
//! the server has better use for them, and because fresh pages are dear where a hypervisor has to find them first.
//!
//! # Why these checksums
//!
//! A generation holds a checksum of every tensor and of every shard's header, so every byte of every shard is covered.
//! A tensor's is made of those of its blocks of 16 KiB, so a sync hashes only blocks that differ: their old
//! content against the sum (somebody else's change is noticed before it is written over) and their new. The old content
//! of a block that the same handle wrote is checked by an XXH3-64 that it remembers: four times as fast. A block
//! that does not differ keeps its sum, so that damage never becomes the truth. The sums take 0.2% of the weights.
//! BLAKE3, because the same document vouches for files that are copied elsewhere; XXH3-64 for sectors and frames of the
//! journal, where nobody has to be kept from forging: BLAKE3 of so short an input as a sector would cost more than the
//! compression, and of the frames a third of it.

#![deny(unsafe_code)]

mod checkpoint;
mod commit;
mod compare;
mod delta;
mod directories;
mod disk;
mod donors;
mod error;
mod expected;
mod export;
mod generation;
mod journal;
mod known;
mod layout;
mod pack;
mod pass;
mod piece;
mod pipeline;
mod readers;
mod record;
mod recover;
mod repair;
mod retain;
mod segments;
mod shards;
mod source;
mod storage;
mod sums;
mod verify;
mod verify_history;

pub use checkpoint::{Checkpoint, LiveTensor, LiveWeights, Options, Part, Reads, list};
pub use commit::{RollbackReport, SyncReport};
pub use directories::Published;
pub use error::{Error, Result};
pub use expected::{Expected, Unexpected, current};
pub use export::{ExportReport, export};
pub use generation::{Generation, Progress, ShardSum, StateSum, TensorSum};
pub use readers::Reading;
pub use recover::Recovery;
pub use repair::{RepairReport, Repaired, Sources, repair};
pub use retain::Keep;
pub use storage::{Kind, Open, RealStorage, Stat, Storage, StorageFile};
pub use verify::{Damage, VerifyReport, verify};
