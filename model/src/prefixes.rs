//! Keys and values of contexts that were run lately, for examples that begin alike.
//!
//! Blocks of [`BLOCK`] tokens form a tree: a block's keys and values depend on every token before it, so it is found by
//! its parent and its own tokens, and what several contexts begin with is held once. Where room is short, the leaf goes
//! that was unused for longest.
//!
//! Keys and values are those of the weights that they were computed with. A block knows the oldest weights that it or
//! anything before it rests on, counted in updates, and goes when there were more than `max_updates` since: with 0 it
//! serves the examples of one step, with more it is an approximation. Nothing here depends on the time: the same examples
//! and updates find the same blocks.

use crate::cache::Held;
use compute::{Device, Dtype};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Tokens of a block. A context is shared in whole blocks, so that up to one less is run again.
pub(crate) const BLOCK: usize = 32;

/// How much is kept of contexts, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixLimits {
    /// Tokens whose keys and values are kept at most; none are with less than a block, 32.
    pub tokens: usize,
    /// Updates of the weights after which they still serve.
    pub max_updates: u64,
}

/// The tree's root, which is no block.
const ROOT: u64 = 0;

/// Shape of a block's elements: for each layer keys, then values, [`BLOCK`] rows of `row` elements.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub layers: usize,
    pub row: usize,
    pub dtype: Dtype,
}

pub(crate) struct Prefixes<D: Device> {
    device: Arc<D>,
    shape: Shape,
    limits: PrefixLimits,
    blocks: BTreeMap<u64, Block<D>>,
    /// By parent and tokens.
    children: HashMap<(u64, Vec<u32>), u64>,
    /// Number of the block that was made last, and of the context that was looked at last.
    last: u64,
    now: u64,
    /// Updates of the weights so far.
    updates: u64,
}

struct Block<D: Device> {
    parent: u64,
    ids: Vec<u32>,
    elements: D::Stored,
    children: usize,
    /// Context that last had it.
    used: u64,
    /// The oldest weights that it rests on.
    version: u64,
}

impl<D: Device> Prefixes<D> {
    pub fn new(device: Arc<D>, shape: Shape) -> Prefixes<D> {
        let (limits, blocks, children) = (PrefixLimits::default(), BTreeMap::new(), HashMap::new());
        Prefixes { device, shape, limits, blocks, children, last: ROOT, now: 0, updates: 0 }
    }

    pub fn limit(&mut self, limits: PrefixLimits) {
        self.limits = limits;
        self.forget();
    }

    pub fn forget(&mut self) {
        self.blocks.clear();
        self.children.clear();
    }

    /// Updates of the weights so far: the version of what is computed now.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Counts an update, and lets go of what rests on weights that are too old after it.
    pub fn weights_moved(&mut self) {
        self.updates += 1;
        let oldest = self.updates.saturating_sub(self.limits.max_updates);
        // A block is never younger than what comes after it, so no block stays without its parent.
        self.blocks.retain(|_, block| block.version >= oldest);
        self.children.retain(|_, id| self.blocks.contains_key(id));
        let parents: Vec<u64> = self.blocks.values().map(|block| block.parent).collect();
        self.blocks.values_mut().for_each(|block| block.children = 0);
        for parent in parents.into_iter().filter(|parent| *parent != ROOT) {
            self.blocks.get_mut(&parent).expect("it is as old as its child").children += 1;
        }
    }

    /// The blocks that begin `context`, in order, which count as used now.
    pub fn find(&mut self, context: &[u32]) -> Vec<u64> {
        self.now += 1;
        let (mut found, mut parent) = (Vec::new(), ROOT);
        for ids in context.chunks_exact(BLOCK) {
            let Some(&id) = self.children.get(&(parent, ids.to_vec())) else { break };
            self.blocks.get_mut(&id).expect("children are blocks").used = self.now;
            found.push(id);
            parent = id;
        }
        found
    }

    /// The oldest weights that these blocks rest on.
    pub fn version(&self, blocks: &[u64]) -> Option<u64> {
        blocks.iter().map(|id| self.blocks[id].version).min()
    }

    /// Copies rows `first..` of a block to rows `to..` of a layer's keys and values.
    pub fn copy_out(&self, id: u64, first: usize, layer: usize, held: &mut Held<D>, to: usize) {
        let (Shape { row, .. }, (keys, values)) = (self.shape, held.keys_mut());
        let (elements, len) = (&self.blocks[&id].elements, (BLOCK - first) * row);
        self.device.copy_stored(keys, to * row, elements, (2 * layer * BLOCK + first) * row, len);
        self.device.copy_stored(values, to * row, elements, ((2 * layer + 1) * BLOCK + first) * row, len);
    }

    /// Keeps the whole blocks of a context that was run with weights no older than `version`, as far as there is room.
    pub fn keep(&mut self, context: &[u32], layers: &[Held<D>], version: u64) {
        if self.limits.tokens < BLOCK {
            return;
        }
        let found = self.find(context);
        let (known, mut parent) = (found.len(), found.last().copied().unwrap_or(ROOT));
        for (i, ids) in context.chunks_exact(BLOCK).enumerate().skip(known) {
            if !self.make_room() {
                break;
            }
            let version = self.blocks.get(&parent).map_or(version, |parent| parent.version.min(version));
            let elements = self.copied(layers, i * BLOCK);
            self.last += 1;
            let (id, ids) = (self.last, ids.to_vec());
            self.children.insert((parent, ids.clone()), id);
            self.blocks.insert(id, Block { parent, ids, elements, children: 0, used: self.now, version });
            if let Some(parent) = self.blocks.get_mut(&parent) {
                parent.children += 1;
            }
            parent = id;
        }
    }

    /// A block's elements from rows `first..` of every layer.
    fn copied(&self, layers: &[Held<D>], first: usize) -> D::Stored {
        let Shape { layers: count, row, dtype } = self.shape;
        let len = BLOCK * row;
        let mut elements = self.device.stored(dtype, 2 * count * len);
        for (layer, (keys, values)) in layers.iter().map(Held::keys).enumerate() {
            self.device.copy_stored(&mut elements, 2 * layer * len, keys, first * row, len);
            self.device.copy_stored(&mut elements, (2 * layer + 1) * len, values, first * row, len);
        }
        elements
    }

    /// Whether there is room for one more block, which the leaf unused for longest makes; none of the context at hand.
    fn make_room(&mut self) -> bool {
        if (self.blocks.len() + 1) * BLOCK <= self.limits.tokens {
            return true;
        }
        let leaves = self.blocks.iter().filter(|(_, block)| block.children == 0 && block.used < self.now);
        let Some(id) = leaves.min_by_key(|(id, block)| (block.used, **id)).map(|(id, _)| *id) else { return false };
        let Block { parent, ids, .. } = self.blocks.remove(&id).expect("it was just found");
        self.children.remove(&(parent, ids));
        if let Some(parent) = self.blocks.get_mut(&parent) {
            parent.children -= 1;
        }
        true
    }

    /// Tokens that are kept.
    pub fn tokens(&self) -> usize {
        self.blocks.len() * BLOCK
    }
}
