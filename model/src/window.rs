//! Context-frozen training of one example.
//!
//! Context c_0..c_{k-1}, decision d_0..d_{j-1}. Prefill runs c_0..c_{k-2} without gradients and leaves
//! keys and values; the window runs c_{k-1}, d_0..d_{j-2} with gradients and predicts d_0..d_{j-1}.
//! Several decision spans of one conversation are several windows: each has everything before it as
//! its frozen context, and all of them are computed before any update.
//!
//! With [`Extent::Full`] the window reaches back to the first token and gradients flow through the
//! context as well; the loss is the same. That is what others do, for comparison.

use crate::cache::Cache;
use crate::forward::Model;
use crate::recorded::Inputs;
use compute::{Device, Sink};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Token ids and which of them are decisions.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    ids: Vec<u32>,
    spans: Vec<Range<usize>>,
}

/// How far back gradients flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Extent {
    /// Through the decision tokens only.
    #[default]
    Frozen,
    /// Through the whole example.
    Full,
}

/// One window: tokens that run with gradients, of which the last `targets.len()` are scored.
struct Window<'a> {
    ids: &'a [u32],
    targets: &'a [u32],
}

impl Example {
    /// Where the window of a span begins.
    fn window_start(span: &Range<usize>, extent: Extent) -> usize {
        match extent {
            Extent::Frozen => span.start - 1,
            Extent::Full => 0,
        }
    }
}

/// An example that cannot be trained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExampleError {
    /// No decision, or an empty one.
    #[error("the example has no decision tokens")]
    Empty,
    /// The first token has nothing before it to be predicted from.
    #[error("a decision starts at token 0; it needs at least one token of context")]
    NoContext,
    /// A span outside the tokens, or out of order.
    #[error("decision {start}..{end} of {tokens} tokens is out of range or overlaps the one before")]
    Span {
        /// First token of the span.
        start: usize,
        /// One past its last token.
        end: usize,
        /// Length of the example.
        tokens: usize,
    },
    /// Longer than the model was prepared for.
    #[error("{tokens} tokens; at most {most} can be trained (train.max_tokens)")]
    TooLong {
        /// Length of the example.
        tokens: usize,
        /// The limit.
        most: usize,
    },
    /// A token outside the vocabulary.
    #[error("token {token} at position {position} is outside the vocabulary of {vocab}")]
    Vocabulary {
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
}

/// Loss of one example.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Sum of the cross entropies, in nats.
    pub loss_sum: f64,
    /// Decision tokens.
    pub tokens: usize,
}

impl Report {
    /// Of the cross entropies of an example's decision tokens.
    fn of(losses: &[f32]) -> Report {
        Report { loss_sum: losses.iter().map(|loss| f64::from(*loss)).sum(), tokens: losses.len() }
    }

    /// Mean cross entropy of the decision tokens.
    pub fn loss(&self) -> f32 {
        (self.loss_sum / self.tokens as f64) as f32
    }
}

/// Where the time went, in milliseconds; adds up over examples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Context without gradients.
    pub prefill_ms: f64,
    /// Window forward, loss included.
    pub forward_ms: f64,
    /// Window backward; with forward, where the two are recorded work that runs as a whole.
    pub backward_ms: f64,
}

impl Example {
    /// Decision spans in ascending order, each with at least one token before it.
    pub fn new(ids: Vec<u32>, spans: Vec<Range<usize>>) -> Result<Example, ExampleError> {
        let mut end = 0;
        for span in &spans {
            if span.is_empty() {
                return Err(ExampleError::Empty);
            }
            if span.start == 0 {
                return Err(ExampleError::NoContext);
            }
            if span.start < end || span.end > ids.len() {
                return Err(ExampleError::Span { start: span.start, end: span.end, tokens: ids.len() });
            }
            end = span.end;
        }
        if spans.is_empty() { Err(ExampleError::Empty) } else { Ok(Example { ids, spans }) }
    }

    /// Whether a model of so many positions and words can train it.
    pub fn check(&self, positions: usize, vocab: usize) -> Result<(), ExampleError> {
        if self.ids.len() > positions {
            return Err(ExampleError::TooLong { tokens: self.ids.len(), most: positions });
        }
        match self.ids.iter().position(|&id| id as usize >= vocab) {
            Some(position) => Err(ExampleError::Vocabulary { token: self.ids[position], position, vocab }),
            None => Ok(()),
        }
    }

    /// All token ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
    /// The decision spans within them.
    pub fn spans(&self) -> &[Range<usize>] {
        &self.spans
    }
    /// Decision tokens.
    pub fn tokens(&self) -> usize {
        self.spans.iter().map(|s| s.len()).sum()
    }
}

/// For a pass without gradients.
struct Nobody;

impl<D: Device> Sink<D> for Nobody {
    fn linear(&mut self, _: usize, _: &Arc<D::Buffer>, _: &Arc<D::Buffer>, _: usize) {}
    fn rows(&mut self, _: usize, _: &[u32], _: &Arc<D::Buffer>) {}
    fn dense(&mut self, _: usize, _: &Arc<D::Buffer>) {}
    fn wants(&self, _: usize) -> bool {
        false
    }
}

impl<D: Device> Model<D> {
    /// Whether this model can train the example.
    pub fn check(&self, example: &Example) -> Result<(), ExampleError> {
        example.check(self.positions(), self.config().decoder.vocab)
    }

    /// Forward and backward over every span of an example that passed [`Model::check`]. `scale` is
    /// the weight of one token's loss in the step's loss: 1 over the step's decision tokens. The
    /// cache is overwritten, but for what the context shares with the one in it or with earlier ones that it keeps.
    pub fn train(
        &self,
        cache: &mut Cache<D>,
        example: &Example,
        extent: Extent,
        scale: f32,
        sink: &mut impl Sink<D>,
        timings: &mut Timings,
    ) -> Report {
        Report::of(&self.spans(cache, example, extent, scale, Some(sink), timings))
    }

    /// Loss without gradients.
    pub fn loss(&self, cache: &mut Cache<D>, example: &Example) -> Report {
        Report::of(&self.losses(cache, example))
    }

    /// Cross entropy of each decision token in nats, without gradients: its negative natural log-probability.
    pub fn losses(&self, cache: &mut Cache<D>, example: &Example) -> Vec<f32> {
        self.spans::<Nobody>(cache, example, Extent::Frozen, 1.0, None, &mut Timings::default())
    }

    /// Natural log-probabilities of `ids[1..]`, each given all ids before it. The ids are at least two, within the
    /// vocabulary and no more than [`Model::positions`]; the cache is emptied.
    pub fn logprobs(&self, cache: &mut Cache<D>, ids: &[u32]) -> Vec<f32> {
        cache.clear();
        let window = Window { ids: &ids[..ids.len() - 1], targets: &ids[1..] };
        let losses = self.window::<Nobody>(cache, window, 1.0, None, &mut Timings::default());
        losses.iter().map(|loss| -loss).collect()
    }

    fn spans<S: Sink<D>>(
        &self,
        cache: &mut Cache<D>,
        example: &Example,
        extent: Extent,
        scale: f32,
        mut sink: Option<&mut S>,
        timings: &mut Timings,
    ) -> Vec<f32> {
        let mut losses = Vec::with_capacity(example.tokens());
        for span in &example.spans {
            let start = Example::window_start(span, extent);
            let clock = Instant::now();
            cache.recall(&example.ids[..start]);
            self.prefill(cache, &example.ids[cache.len()..start]);
            cache.keep();
            self.device.synchronize();
            timings.prefill_ms += ms(clock);
            let window = Window { ids: &example.ids[start..span.end - 1], targets: &example.ids[span.clone()] };
            losses.extend(self.window(cache, window, scale, sink.as_deref_mut(), timings));
        }
        losses
    }

    /// One window: its losses, one per target, and gradient events if there is a sink.
    fn window<S: Sink<D>>(
        &self,
        cache: &mut Cache<D>,
        window: Window,
        scale: f32,
        sink: Option<&mut S>,
        timings: &mut Timings,
    ) -> Vec<f32> {
        let scored = window.targets.len();
        let mut host = vec![0.0; scored];
        let clock = Instant::now();
        match sink {
            Some(sink) if let Some(recorded) = self.recorded(cache, window.ids.len(), scored, sink) => {
                let losses = self.replay(recorded, window.ids, window.targets, scale, sink);
                self.device.read(losses, 0, &mut host);
                timings.backward_ms += ms(clock);
            }
            sink => {
                let inputs = Inputs::new(&*self.device, window.ids, window.targets, scale);
                let losses = self.pass(cache, &inputs, window.ids, scored, sink, timings);
                self.device.read(&losses, 0, &mut host);
            }
        }
        host
    }

    /// Forward, loss and, if there is a sink, backward of the window `ids`, whose last `scored` rows have targets: their
    /// losses, and gradient events.
    pub(crate) fn pass<S: Sink<D>>(
        &self,
        cache: &Cache<D>,
        inputs: &Inputs<D>,
        ids: &[u32],
        scored: usize,
        sink: Option<&mut S>,
        timings: &mut Timings,
    ) -> D::Buffer {
        let (t, vocab) = (ids.len(), self.config().decoder.vocab);
        let clock = Instant::now();
        let mut x = Arc::new(self.embed(&inputs.ids, t));
        let mut saved = Vec::new();
        for layer in 0..self.layers.len() {
            let (next, activations) = self.layer(layer, x, cache.context(layer), t, self.windows, false);
            x = next;
            if sink.is_some() {
                saved.push(activations);
            }
        }
        let x = self.last_rows(x, t, scored);
        let (normed, mut logits) = self.logits(&x, scored);
        let mut losses = self.device.uninit(scored);
        self.device.cross_entropy(&mut losses, &mut logits, &inputs.targets, vocab, &inputs.scale);
        timings.forward_ms += ms(clock);
        if let Some(sink) = sink {
            let clock = Instant::now();
            let (normed, dlogits) = (Arc::new(normed), Arc::new(logits));
            let dx = self.head_backward(&x, &normed, &dlogits, scored, sink);
            let mut dx = self.as_last_rows(dx, t, scored);
            let mut complete = true;
            for layer in (0..self.layers.len()).rev() {
                if !self.wanted_below(layer + 1, sink) {
                    complete = false;
                    break;
                }
                dx = self.layer_backward(layer, &saved[layer], dx, cache.context(layer), t, sink);
                saved.truncate(layer);
            }
            if complete && sink.wants(self.embed) {
                sink.rows(self.embed, ids, &dx);
            }
            timings.backward_ms += ms(clock);
        }
        losses
    }

    /// The last `rows` of x (t,H).
    fn last_rows(&self, x: Arc<D::Buffer>, t: usize, rows: usize) -> Arc<D::Buffer> {
        if rows == t {
            return x;
        }
        let hidden = self.config().decoder.hidden;
        let mut last = self.device.uninit(rows * hidden);
        self.device.copy(&mut last, 0, &x, (t - rows) * hidden, rows * hidden);
        Arc::new(last)
    }

    /// (t,H) with `last` as its last `rows` and zeros before.
    fn as_last_rows(&self, last: Arc<D::Buffer>, t: usize, rows: usize) -> Arc<D::Buffer> {
        if rows == t {
            return last;
        }
        let hidden = self.config().decoder.hidden;
        let mut all = self.device.zeros(t * hidden);
        self.device.copy(&mut all, (t - rows) * hidden, &last, 0, rows * hidden);
        Arc::new(all)
    }
}

fn ms(clock: Instant) -> f64 {
    clock.elapsed().as_secs_f64() * 1e3
}
