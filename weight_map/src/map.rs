//! From a server's tensors to one row-contiguous view per tensor of the model.
//!
//! expected (names, shapes) × server (names, shapes, spans) × packing -> views, in expected order.
//! Order of the checks: each server tensor is claimed for what it holds, then the tied head is judged,
//! then what is missing, then overlaps. Spans of whole server tensors are compared, not only those of
//! views, so that the padding of a vocabulary cannot hide a neighbour.

use crate::names::{
    canonical_name, default_parts, is_known_buffer, is_other_part, merged_name, stack_of, stacked_parts,
};
use crate::{Dtype, Error, HfTensor, Role, RowOrder, matrix_shape};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};

/// Servers round the rows of an embedding or a head up to a multiple of this many.
const VOCAB_MULTIPLE: usize = 64;
/// More padding than this is taken for another model.
const VOCAB_PADDING_MAX: usize = 1024;
/// The head's name in the files.
const HEAD: &str = "lm_head.weight";

/// A tensor as the server holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerTensor {
    /// Name as the server spells it.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape in elements.
    pub shape: Vec<usize>,
    /// Strides in elements, as many as the shape has dimensions.
    pub strides: Vec<usize>,
    /// Index of its allocation.
    pub allocation: usize,
    /// First byte in the allocation.
    pub offset: u64,
}

/// Which tensors of the model a merged server tensor holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packing {
    /// Name of the merged tensor as the server spells it.
    pub merged: String,
    /// Hugging Face names of its parts, in row order.
    pub parts: Vec<String>,
}

/// One tensor of the model, in place in the server's memory. Always contiguous.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Hugging Face name.
    pub name: String,
    /// Shape in the model: (rows, cols) or (n,).
    pub shape: Vec<usize>,
    /// What it does.
    pub role: Role,
    /// Element type in the server.
    pub dtype: Dtype,
    /// Index of the server tensor that holds it.
    pub server_tensor: usize,
    /// Index of the allocation.
    pub allocation: usize,
    /// First byte in the allocation.
    pub offset: u64,
    /// Order of its rows there.
    #[serde(default)]
    pub row_order: RowOrder,
}

impl View {
    /// Rows of a matrix; 1 for anything else.
    pub fn rows(&self) -> usize {
        matrix_shape(&self.shape).0
    }

    /// Columns of a matrix; the number of elements of anything else.
    pub fn cols(&self) -> usize {
        matrix_shape(&self.shape).1
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes, from `offset`.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }
}

/// Every tensor of the model with its place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightMap {
    /// One view per expected tensor, in the order of the expected list.
    pub views: Vec<View>,
}

impl WeightMap {
    /// Index of the tensor with this Hugging Face name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.views.iter().position(|view| view.name == name)
    }

    /// Says that the server holds the rows of queries and keys, and the elements of their biases, as
    /// [`RowOrder::Interleaved`], which llama.cpp does for its architecture `llama`.
    ///
    /// # Errors
    /// [`Error::Heads`]: the rows are no whole heads of an even number of rows.
    pub fn interleave_heads(&mut self, head_dim: usize) -> Result<(), Error> {
        let order = RowOrder::Interleaved { head_dim };
        for view in &mut self.views {
            let module = view.name.rsplit_once('.').map_or("", |(module, _)| module);
            if !module.ends_with(".q_proj") && !module.ends_with(".k_proj") {
                continue;
            }
            if !order.fits(view.shape[0]) {
                return Err(Error::Heads { name: view.name.clone(), rows: view.shape[0], head_dim });
            }
            view.row_order = order;
        }
        Ok(())
    }

    /// Total bytes of all views.
    pub fn bytes(&self) -> u64 {
        self.views.iter().map(|view| view.bytes() as u64).sum()
    }
}

/// The tensors of a model as vLLM holds them in one allocation, merged by default: for who plans without a server.
pub fn merged_layout(expected: &[HfTensor], dtype: Dtype) -> Vec<ServerTensor> {
    let (mut list, mut places): (Vec<ServerTensor>, HashMap<String, usize>) = (Vec::new(), HashMap::new());
    for tensor in expected {
        let name = canonical_name(&tensor.name);
        let stack = stack_of(&name);
        let in_stack = |shape: &[usize], parts: usize| [1, shape[0] * parts, shape[1]].to_vec();
        let (name, shape) = match &stack {
            Some((stack, parts)) => (stack.clone(), in_stack(&tensor.shape, *parts)),
            None => (merged_name(&name).unwrap_or(name), tensor.shape.clone()),
        };
        match places.get(&name) {
            // The second of an expert's two has its place already.
            Some(_) if stack.is_some() && tensor.name.ends_with(".up_proj.weight") => {}
            Some(&at) => list[at].shape[0] += shape[0],
            None => {
                places.insert(name.clone(), list.len());
                list.push(ServerTensor { name, dtype, shape, strides: Vec::new(), allocation: 0, offset: 0 });
            }
        }
    }
    let mut offset = 0;
    for tensor in &mut list {
        tensor.strides = (0..tensor.shape.len()).map(|axis| tensor.shape[axis + 1..].iter().product()).collect();
        tensor.offset = offset;
        offset += (tensor.shape.iter().product::<usize>() * dtype.size()) as u64;
    }
    list
}

/// Finds every expected tensor in the server's memory.
///
/// `packing` says what merged tensors hold; for a merged tensor that it does not mention, the default
/// order of vLLM and SGLang is assumed (q, k, v and gate, up). An embedding or head with more rows than
/// the vocabulary, rounded up to a multiple of 64, is a padded one: its view covers the first rows. The
/// head of a tied model may appear as an alias of the embedding, and so may any tensor under a name that the model does not know,
/// as the router does that vLLM's experts hold as well. Parts beside the decoder ([`is_other_part`]) get no view.
///
/// # Errors
/// Anything that does not fit exactly; see [`Error`].
pub fn map(expected: &[HfTensor], server: &[ServerTensor], packing: &[Packing]) -> Result<WeightMap, Error> {
    let mut claims = Claims::new(expected, server)?;
    let packing = packing_by_name(packing, server)?;
    let mut ignored = vec![false; server.len()];
    let (mut tied_head, mut unknown) = (None, Vec::new());
    for (index, tensor) in server.iter().enumerate() {
        let name = canonical_name(&tensor.name);
        if let Some(packing) = packing.get(&name) {
            claims.merged(index, &packing.parts)?;
        } else if claims.by_name.contains_key(name.as_str()) {
            claims.whole(index, &name)?;
        } else if let Some(parts) = default_parts(&name).filter(|parts| claims.know_all(parts)) {
            claims.merged(index, &parts)?;
        } else if let Some(parts) = claims.stacked_parts(&name, &tensor.shape) {
            claims.merged(index, &parts)?;
        } else if name == HEAD && expected.iter().any(|tensor| tensor.role == Role::Embedding) {
            if let Some(first) = tied_head.replace(index) {
                return Err(twice(HEAD, &server[first], tensor));
            }
        } else if is_known_buffer(&name) || is_other_part(&name) {
            ignored[index] = true;
        } else {
            unknown.push(index);
        }
    }
    refuse_all_but_aliases(&unknown, server, &claims)?;
    let views = claims.finish()?;
    if let Some(head) = tied_head {
        check_alias(&server[head], &views, server)?;
    }
    let aliases: Vec<usize> = unknown.into_iter().chain(tied_head).collect();
    check_overlaps(server, &ignored, &aliases)?;
    Ok(WeightMap { views })
}

fn packing_by_name<'a>(packing: &'a [Packing], server: &[ServerTensor]) -> Result<HashMap<String, &'a Packing>, Error> {
    let refuse =
        |entry: &Packing, reason: &str| Err(Error::Packing { merged: entry.merged.clone(), reason: reason.to_owned() });
    let held: std::collections::HashSet<String> = server.iter().map(|tensor| canonical_name(&tensor.name)).collect();
    let mut by_name = HashMap::new();
    for entry in packing {
        let name = canonical_name(&entry.merged);
        if entry.parts.is_empty() {
            return refuse(entry, "it lists no parts");
        }
        if !held.contains(&name) {
            return refuse(entry, "the server lists no tensor of that name; take the packing from the running server");
        }
        if by_name.insert(name, entry).is_some() {
            return refuse(entry, "it is described twice");
        }
    }
    Ok(by_name)
}

/// The views found so far, one place per expected tensor.
struct Claims<'a> {
    expected: &'a [HfTensor],
    server: &'a [ServerTensor],
    /// By canonical name.
    by_name: HashMap<String, usize>,
    views: Vec<Option<View>>,
}

impl<'a> Claims<'a> {
    fn new(expected: &'a [HfTensor], server: &'a [ServerTensor]) -> Result<Self, Error> {
        let mut by_name = HashMap::with_capacity(expected.len());
        for (index, tensor) in expected.iter().enumerate() {
            if by_name.insert(canonical_name(&tensor.name), index).is_some() {
                return Err(Error::ExpectedTwice { name: tensor.name.clone() });
            }
        }
        Ok(Claims { expected, server, by_name, views: vec![None; expected.len()] })
    }

    fn know_all(&self, parts: &[String]) -> bool {
        parts.iter().all(|part| self.by_name.contains_key(part))
    }

    /// The experts' matrices that a stack of this name and shape holds, if they are this model's.
    fn stacked_parts(&self, name: &str, shape: &[usize]) -> Option<Vec<String>> {
        let &[experts, _, _] = shape else { return None };
        if !(1..=self.expected.len()).contains(&experts) {
            return None;
        }
        stacked_parts(name, experts).filter(|parts| self.know_all(parts))
    }

    /// Claims a server tensor that is one tensor of the model, perhaps with padded rows.
    fn whole(&mut self, index: usize, name: &str) -> Result<(), Error> {
        let tensor = &self.server[index];
        let at = self.by_name[name];
        let expected = &self.expected[at];
        if tensor.shape != expected.shape && !is_padded_vocab(expected, &tensor.shape) {
            return Err(Error::Shape {
                name: tensor.name.clone(),
                hf_name: expected.name.clone(),
                expected: expected.shape.clone(),
                found: tensor.shape.clone(),
                hint: shape_hint(&expected.shape, &tensor.shape),
            });
        }
        check_layout(tensor)?;
        self.claim(at, index, tensor.offset)
    }

    /// Claims a server tensor that holds `parts` one under the other; a stack of matrices is one tall matrix.
    fn merged(&mut self, index: usize, parts: &[String]) -> Result<(), Error> {
        let tensor = &self.server[index];
        let places = parts.iter().map(|part| self.place_of(tensor, part)).collect::<Result<Vec<_>, _>>()?;
        let shapes: Vec<&[usize]> = places.iter().map(|&at| self.expected[at].shape.as_slice()).collect();
        let described =
            || parts.iter().zip(&shapes).map(|(part, shape)| format!("`{part}` {shape:?}")).collect::<Vec<_>>();
        let mixed = || Error::MixedParts { name: tensor.name.clone(), parts: described() };
        if shapes[0].is_empty() || shapes.iter().any(|shape| shape.get(1..) != shapes[0].get(1..)) {
            return Err(mixed());
        }
        let mut stacked = shapes[0].to_vec();
        stacked[0] = shapes.iter().try_fold(0usize, |sum, shape| sum.checked_add(shape[0])).ok_or_else(mixed)?;
        if flattened(&tensor.shape, stacked.len()).as_deref() != Some(&stacked) {
            return Err(Error::Merged {
                name: tensor.name.clone(),
                found: tensor.shape.clone(),
                parts: described(),
                hint: shape_hint(&stacked, &tensor.shape),
                expected: stacked,
            });
        }
        check_layout(tensor)?;
        let mut offset = tensor.offset;
        for at in places {
            self.claim(at, index, offset)?;
            // check_layout proved that the whole tensor ends within u64, so its parts do.
            offset += (self.expected[at].shape.iter().product::<usize>() * tensor.dtype.size()) as u64;
        }
        Ok(())
    }

    fn place_of(&self, tensor: &ServerTensor, part: &str) -> Result<usize, Error> {
        self.by_name.get(canonical_name(part).as_str()).copied().ok_or_else(|| Error::Packing {
            merged: tensor.name.clone(),
            reason: format!("its part `{part}` is no tensor of the model; parts carry the names of the model's files"),
        })
    }

    fn claim(&mut self, at: usize, index: usize, offset: u64) -> Result<(), Error> {
        let (tensor, expected) = (&self.server[index], &self.expected[at]);
        if let Some(view) = &self.views[at] {
            return Err(twice(&expected.name, &self.server[view.server_tensor], tensor));
        }
        self.views[at] = Some(View {
            name: expected.name.clone(),
            shape: expected.shape.clone(),
            role: expected.role,
            dtype: tensor.dtype,
            server_tensor: index,
            allocation: tensor.allocation,
            offset,
            row_order: RowOrder::AsFiles,
        });
        Ok(())
    }

    fn finish(self) -> Result<Vec<View>, Error> {
        let names: Vec<String> = self
            .expected
            .iter()
            .zip(&self.views)
            .filter(|(_, view)| view.is_none())
            .map(|(tensor, _)| tensor.name.clone())
            .collect();
        if names.is_empty() { Ok(self.views.into_iter().flatten().collect()) } else { Err(Error::Missing { names }) }
    }
}

fn twice(name: &str, first: &ServerTensor, second: &ServerTensor) -> Error {
    Error::TwiceMapped { name: name.to_owned(), first: first.name.clone(), second: second.name.clone() }
}

/// A shape as one of `dimensions`, of which the first is that of all before the last ones.
fn flattened(shape: &[usize], dimensions: usize) -> Option<Vec<usize>> {
    let (first, last) = shape.split_at_checked((shape.len() + 1).checked_sub(dimensions)?)?;
    let rows = first.iter().try_fold(1usize, |product, &n| product.checked_mul(n))?;
    (!first.is_empty()).then(|| [&[rows], last].concat())
}

fn is_padded_vocab(expected: &HfTensor, found: &[usize]) -> bool {
    matches!(expected.role, Role::Embedding | Role::Head)
        && found.len() == 2
        && found[1..] == expected.shape[1..]
        && found[0] > expected.shape[0]
        && found[0] - expected.shape[0] < VOCAB_PADDING_MAX
        && found[0].is_multiple_of(VOCAB_MULTIPLE)
}

fn shape_hint(expected: &[usize], found: &[usize]) -> String {
    let shards = (expected.len() == found.len())
        .then(|| expected.iter().zip(found).filter(|(want, have)| want != have).collect::<Vec<_>>())
        .filter(|differing| differing.len() == 1)
        .map(|differing| differing[0])
        .filter(|&(&want, &have)| have > 0 && have < want && want % have == 0)
        .map(|(want, have)| want / have);
    match shards {
        Some(n) => format!("it looks like one of {n} tensor-parallel shards: serve with tensor parallel size 1"),
        None => "check that the server loaded this model directory".into(),
    }
}

/// Row-contiguous, aligned, and within 64 bits.
fn check_layout(tensor: &ServerTensor) -> Result<(), Error> {
    span(tensor)?;
    let mut want = vec![1; tensor.shape.len()];
    for axis in (1..tensor.shape.len()).rev() {
        // span() proved that the product of the shape fits.
        want[axis - 1] = want[axis] * tensor.shape[axis];
    }
    // The stride of an axis of one element is never used, and servers write anything there.
    let contiguous = tensor.strides.len() == want.len()
        && tensor.shape.iter().zip(tensor.strides.iter().zip(&want)).all(|(&n, (have, want))| n == 1 || have == want);
    if !contiguous {
        return Err(Error::Strides {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            strides: tensor.strides.clone(),
            want,
        });
    }
    if !tensor.offset.is_multiple_of(tensor.dtype.size() as u64) {
        return Err(Error::Misaligned {
            name: tensor.name.clone(),
            allocation: tensor.allocation,
            offset: tensor.offset,
            dtype: tensor.dtype,
        });
    }
    Ok(())
}

/// First byte and the byte after the last one that the tensor's strides can reach.
fn span(tensor: &ServerTensor) -> Result<(u64, u64), Error> {
    let end = || -> Option<u64> {
        let size = tensor.dtype.size();
        tensor.shape.iter().try_fold(size, |product, &n| product.checked_mul(n))?;
        if tensor.shape.contains(&0) {
            return Some(tensor.offset);
        }
        let last = tensor
            .shape
            .iter()
            .zip(&tensor.strides)
            .try_fold(0usize, |last, (&n, &stride)| last.checked_add((n - 1).checked_mul(stride)?))?;
        let bytes = last.checked_add(1)?.checked_mul(size)?;
        tensor.offset.checked_add(u64::try_from(bytes).ok()?)
    };
    end().map(|end| (tensor.offset, end)).ok_or_else(|| Error::Overflow {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        offset: tensor.offset,
    })
}

/// A tensor of an unknown name must be one that has a view, under another name.
fn refuse_all_but_aliases(unknown: &[usize], server: &[ServerTensor], claims: &Claims) -> Result<(), Error> {
    let mapped: HashSet<usize> = claims.views.iter().flatten().map(|view| view.server_tensor).collect();
    for tensor in unknown.iter().map(|&index| &server[index]) {
        if !mapped.iter().any(|&other| same_place(tensor, &server[other])) {
            return Err(Error::Unmapped { name: tensor.name.clone(), shape: tensor.shape.clone() });
        }
    }
    Ok(())
}

/// Whether two tensors are the same elements in the same order.
fn same_place(a: &ServerTensor, b: &ServerTensor) -> bool {
    (a.allocation, a.offset, a.dtype) == (b.allocation, b.offset, b.dtype)
        && (&a.shape, &a.strides) == (&b.shape, &b.strides)
}

/// The head of a tied model must be the embedding itself.
fn check_alias(head: &ServerTensor, views: &[View], server: &[ServerTensor]) -> Result<(), Error> {
    let embedding = views
        .iter()
        .find(|view| view.role == Role::Embedding)
        .map(|view| &server[view.server_tensor])
        .expect("a tied head is only noted when an embedding is expected, and every expected tensor has a view");
    if same_place(head, embedding) {
        return Ok(());
    }
    Err(Error::TiedCopy {
        name: head.name.clone(),
        allocation: head.allocation,
        offset: head.offset,
        embedding: embedding.name.clone(),
    })
}

/// No byte of a mapped tensor belongs to another tensor. Ignored buffers may share among themselves.
fn check_overlaps(server: &[ServerTensor], ignored: &[bool], aliases: &[usize]) -> Result<(), Error> {
    struct Span {
        index: usize,
        start: u64,
        end: u64,
    }
    let mut spans = Vec::with_capacity(server.len());
    for (index, tensor) in server.iter().enumerate().filter(|(index, _)| !aliases.contains(index)) {
        let (start, end) = span(tensor)?;
        if start < end {
            spans.push(Span { index, start, end });
        }
    }
    spans.sort_by_key(|span| (server[span.index].allocation, span.start, span.end));
    // The span that reaches furthest so far in this allocation, apart for mapped tensors and buffers.
    let mut furthest: [Option<&Span>; 2] = [None, None];
    for span in &spans {
        let tensor = &server[span.index];
        for (before, kind) in furthest.iter().zip([false, true]) {
            let Some(before) = before else { continue };
            let other = &server[before.index];
            let both_ignored = kind && ignored[span.index];
            if other.allocation == tensor.allocation && span.start < before.end && !both_ignored {
                return Err(Error::Overlap {
                    first: other.name.clone(),
                    second: tensor.name.clone(),
                    allocation: tensor.allocation,
                    first_bytes: (before.start, before.end),
                    second_bytes: (span.start, span.end),
                });
            }
        }
        let slot = &mut furthest[usize::from(ignored[span.index])];
        let further =
            slot.is_none_or(|before| server[before.index].allocation != tensor.allocation || span.end > before.end);
        if further {
            *slot = Some(span);
        }
    }
    Ok(())
}
