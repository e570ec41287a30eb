//! The model directory is the checkpoint: live weights go back into its safetensors files, in place.
//!
//! N, G: generation numbers (the base is 0) · block: 4096 bytes of a file, at multiples of 4096 ·
//! sector: 512 bytes, at multiples of 512 · chunk: 1 MiB, at multiples of 1 MiB, the unit of one record.
//!
//! A sync compares the live weights with the files, writes what differs into a journal, then into the
//! files with `pwrite` (never through a mapping), and publishes generation G. Whatever happens in
//! between, the next [`Checkpoint::open`] finds or makes exactly generation G-1 or exactly generation G.
//!
//! ```text
//! MODEL/.apollod/lock                 flock of the one writer; holds its process id
//! MODEL/.apollod/journal.tmp          a journal being written: means nothing, removed by open
//! MODEL/.apollod/journal              a journal that counts: its generation will be finished
//! MODEL/.apollod/state/G              optimizer state of generation G
//! MODEL/.apollod/sums/G               8 bytes of BLAKE3 for every 64 KiB of every tensor
//! MODEL/.apollod/generations/G.json   the published generation, sealed by a checksum of itself
//! MODEL/.apollod/history/G.delta      the retired journal of G; undoes G to get G-1
//! ```
//!
//! # The journal, byte by byte (all numbers little-endian)
//!
//! ```text
//! 0      8  "APOLJNL1"
//! frames, each:
//!   0    4  tag "HEAD" | "RECD" | "GENR"
//!   4    4  n, length of the body
//!   8    n  body
//!   8+n  8  first 8 bytes of BLAKE3(tag, length, body)
//! end   32  BLAKE3 of every byte before; the file ends here
//!
//! HEAD body: JSON {"generation": G, "previous": G-1, "shards": [{"file", "bytes"}, …]}   one, first
//! RECD body: one chunk of one tensor in which at least one block changed                any number
//!   0    2  shard, index into HEAD's shards
//!   2    1  width of an element in bytes: 1, 2 or 4
//!   3    1  0
//!   4    4  length of the piece in bytes (at most 1 MiB; it never crosses a chunk)
//!   8    8  offset of the piece in the file
//!  16   32  bitmap, bit k of byte k/8 (lowest first): block k of the chunk changed
//!  48   8s  first 8 bytes of BLAKE3 of the NEW content of each of the s sectors of the changed blocks
//!       …   zstd frame of the planes: z = zigzag(new - old) per element, wrapping in its width, first
//!           the lowest byte of every element, then the next byte of every element, …
//! GENR body: the sealed JSON that generations/G.json will hold                          one, last
//! ```
//! Blocks and sectors at the ends of a tensor are cut to the tensor. `width` is 2 for 16-bit and 4 for
//! 32-bit elements whose tensor starts at a multiple of it in the file, otherwise 1, so that no element
//! ever crosses a sector.
//!
//! # Why deltas, and what a sector can be
//!
//! After training nearly every block of a trained matrix differs and each bf16 by a few ulps, so the
//! difference compresses to a tenth or a third where the new bytes would hardly compress at all. The
//! same file read backwards is the undo that rollback needs.
//!
//! A crash leaves each sector old or new: disks write a sector whole, and nothing else is assumed (not
//! pages, not order). One checksum, of the new content, is enough to know which: if
//! (content + difference) has it, the sector was old and the sum is the new content; if the content
//! itself has it, the sector is new; adding a constant is a bijection, so a checksum of the old
//! content would say nothing more, and leaving it out saves 1.6% of the raw bytes. A sector that is
//! neither was changed by someone else or by a failing disk: the sync or the recovery stops with the
//! file, the tensor and the offset, and keeps the journal. Enough to rebuild such a sector would have to
//! be a full image of the new bytes, several times the size of the deltas, and is not kept.
//!
//! Redo writes every changed block again even if it reads as new: after an fsync that failed, a page
//! may read as new, be marked clean, and not be on the disk. For the same reason a failed fsync is
//! never retried: the [`Checkpoint`] refuses further work and has to be opened again.
//!
//! # One sync, and what a crash leaves
//!
//! | crash | happens | found at the next open | becomes |
//! |---|---|---|---|
//! | 1 | while `state/G`, `sums/G` are written or before they are synced | files without a generation | removed; G-1 |
//! | 2 | while `journal.tmp` is written, before or after its fdatasync | `journal.tmp` | removed; G-1 |
//! | 3 | during the rename to `journal` and the fsync of the folder | either name | G-1, or G by case 4 |
//! | 4 | after it, before or among the writes to the shards | complete `journal`, each sector old or new | redo; G |
//! | 5 | after the writes, before or between the fdatasyncs of the shards | as 4 | redo; G |
//! | 6 | while `generations/G.json` is written as `.tmp`, or before its rename is durable | as 4, all new | redo; G |
//! | 7 | after the generation is published, before the journal is retired | as 6, and `G.json` | redo; G |
//! | 8 | during the rename to `history/G.delta` | either name | G |
//! | 9 | while old deltas, states and sums are pruned | some of them are left | pruned; G |
//! | 10 | inside recovery, anywhere | cases 4 to 9 again: recovery is the second half of a sync | G |
//! | 11 | `journal` itself damaged (a disk that lied, a flipped bit) | checksum does not match | files checked in full: all of G-1 (or a published G): discarded; anything else: refused, nothing touched |
//!
//! Before case 3 an error (no space, I/O) leaves the files untouched and G-1 current; after it the
//! generation is certain and a new open finishes it.
//!
//! # Weights that are dear to read
//!
//! Live weights on a GPU are hashed there, block by block, and a sync reads the blocks whose hash differs from that
//! of the last sync ([`LiveWeights::block_hashes`], `known.rs`); everything else of it is as above. Live weights in
//! the machine's memory are compared byte by byte, as reading them is what hashing them would cost.
//!
//! # Why these checksums
//!
//! A generation holds BLAKE3 of every tensor and of every shard's header, so every byte of every shard
//! is covered. The sums per 64 KiB only say where in a tensor the damage is: 150 KB for 1.2 GB of
//! weights. Per 4 KiB they would be 16 times that and name no better place to an operator.

#![forbid(unsafe_code)]

mod checkpoint;
mod commit;
mod delta;
mod disk;
mod error;
mod export;
mod generation;
mod journal;
mod known;
mod layout;
mod recover;
mod retain;
mod source;
mod stream;
mod sums;
mod verify;

pub use checkpoint::{Checkpoint, LiveTensor, LiveWeights, Options, Part, list};
pub use commit::{RollbackReport, SyncReport};
pub use disk::{CrashAction, CrashPoint, Fault};
pub use error::{Error, Result};
pub use export::{ExportReport, export};
pub use generation::{Generation, Progress, ShardSum, StateSum, TensorSum};
pub use recover::Recovery;
pub use verify::{Damage, VerifyReport, verify};
