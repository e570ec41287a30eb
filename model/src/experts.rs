//! A mixture of experts, as transformers computes Qwen3-MoE's and Qwen3.5-MoE's, forward and backward.
//!
//! t tokens · E experts, of which each token has k · H hidden · p = softmax(router(x)) (t,E) · a token's shares: p of its k largest,
//! divided by their sum where the model says so · y = Σ share · expert(x) + sigmoid(gate(x)) · shared(x)
//!
//! Which experts a token has is decided on the host, so that only those are run, each on the rows of its tokens. The choice is a
//! constant of the pass; gradients flow through the shares and the chosen experts, and events come from the latter alone.

use crate::config::Config;
use crate::forward::{Activations, Linear, Model};
use crate::mlp::{Activated, Mlp};
use compute::{Device, Factors, Sink, TensorId};
use std::sync::Arc;

/// Its tensors.
pub(crate) struct ExpertsLayer {
    pub router: Linear,
    pub experts: Vec<Mlp>,
    pub shared: Option<Shared>,
    pub per_token: usize,
    pub normalised: bool,
}

/// The expert that all tokens have, and its gate (1,H).
#[derive(Clone, Copy)]
pub(crate) struct Shared {
    pub mlp: Mlp,
    pub gate: TensorId,
}

/// What backward needs of its forward pass.
pub(crate) struct Routed<D: Device> {
    routing: Routing,
    runs: Vec<Run<D>>,
    shared: Option<SharedRun<D>>,
}

/// An expert and the tokens that chose it.
struct Run<D: Device> {
    expert: usize,
    tokens: Vec<u32>,
    /// Where their shares are in [`Routing::shares`].
    places: Vec<usize>,
    x: Arc<D::Buffer>,
    activated: Activated<D>,
}

struct SharedRun<D: Device> {
    activated: Activated<D>,
    /// (t,H), before the gate.
    y: D::Buffer,
    /// sigmoid of the gate, (t).
    shares: Vec<f32>,
}

impl ExpertsLayer {
    pub fn new(config: &Config, layer: usize, linear: impl Fn(&str) -> Linear) -> ExpertsLayer {
        let experts = config.decoder.experts_of(layer).expect("the layer has them");
        ExpertsLayer {
            router: linear("mlp.gate"),
            experts: (0..experts.count).map(|e| Mlp::new(&format!("mlp.experts.{e}"), &linear)).collect(),
            shared: experts.shared.map(|_| Shared {
                mlp: Mlp::new("mlp.shared_expert", &linear),
                gate: linear("mlp.shared_expert_gate").weight,
            }),
            per_token: experts.per_token,
            normalised: config.shares_normalised,
        }
    }

    /// All of them but the shared expert's gate.
    pub fn linears(&self) -> Vec<Linear> {
        let shared = self.shared.iter().map(|shared| &shared.mlp);
        let of_experts = self.experts.iter().chain(shared).flat_map(|expert| expert.linears());
        std::iter::once(self.router).chain(of_experts).collect()
    }
}

impl<D: Device> Model<D> {
    /// The output (t,H) of t tokens.
    pub(crate) fn experts(
        &self,
        l: &ExpertsLayer,
        x: &D::Buffer,
        t: usize,
        activations: Activations,
    ) -> (D::Buffer, Routed<D>) {
        let hidden = self.config().decoder.hidden;
        // The choice jumps where two experts are equally likely, so nothing is rounded before it.
        let logits = self.host(&self.linear(x, l.router, t, Activations::Exact), t * l.experts.len());
        let routing = Routing::new(&logits, l.experts.len(), l.per_token, l.normalised);
        let mut y = self.device.zeros(t * hidden);
        let runs = routing.runs().into_iter().map(|(expert, tokens, places)| {
            let n = tokens.len();
            let mut rows = self.device.uninit(n * hidden);
            self.device.gather_rows(&mut rows, x, &tokens, hidden);
            let (mut out, activated) = self.mlp(&l.experts[expert], &rows, n, activations);
            self.device.scale_rows(&mut out, &routing.shares_at(&places), hidden);
            self.device.scatter_add_rows(&mut y, &out, &self.device.ids(&tokens), hidden);
            Run { expert, tokens, places, x: Arc::new(rows), activated }
        });
        let runs = runs.collect();
        let shared = l.shared.as_ref().map(|shared| {
            let (out, activated) = self.mlp(&shared.mlp, x, t, activations);
            let gate = Linear { weight: shared.gate, bias: None };
            let shares = self.host(&self.linear(x, gate, t, Activations::Exact), t);
            let shares: Vec<f32> = shares.into_iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect();
            let mut scaled = self.copy_of(&out);
            self.device.scale_rows(&mut scaled, &shares, hidden);
            self.device.add(&mut y, &scaled, t * hidden);
            SharedRun { activated, y: out, shares }
        });
        (y, Routed { routing, runs, shared })
    }

    /// dy (t,H) gives dx (t,H).
    pub(crate) fn experts_backward(
        &self,
        l: &ExpertsLayer,
        saved: &Routed<D>,
        x: &Arc<D::Buffer>,
        dy: &D::Buffer,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> D::Buffer {
        let hidden = self.config().decoder.hidden;
        let mut dx = self.device.zeros(t * hidden);
        let mut dshares = vec![0.0; saved.routing.shares.len()];
        for Run { expert, tokens, places, x, activated } in &saved.runs {
            let (mlp, n, shares) = (&l.experts[*expert], tokens.len(), saved.routing.shares_at(places));
            let mut dout = self.device.uninit(n * hidden);
            self.device.gather_rows(&mut dout, dy, tokens, hidden);
            let inner = self.inner(mlp);
            // d share = <dy, act downᵀ> = <dy down, act>, so that the expert's output need not be kept.
            let mut dact = self.dx(&[(&dout, &self.weights()[mlp.down.weight])], n);
            let dots = self.device.row_dots(&dact, &activated.act, n, inner);
            places.iter().zip(dots).for_each(|(place, dot)| dshares[*place] = dot);
            self.device.scale_rows(&mut dact, &shares, inner);
            self.device.scale_rows(&mut dout, &shares, hidden);
            if sink.wants(mlp.down.weight) {
                sink.linear(mlp.down.weight, &activated.act, &Arc::new(dout), n);
            }
            let drows = self.activation_backward(mlp, activated, x, &dact, n, sink);
            self.device.scatter_add_rows(&mut dx, &drows, &self.device.ids(tokens), hidden);
        }
        if let (Some(shared), Some(run)) = (&l.shared, &saved.shared) {
            self.device.add(&mut dx, &self.shared_backward(shared, run, x, dy, t, sink), t * hidden);
        }
        let dlogits = Arc::new(self.upload(&saved.routing.backward(&dshares)));
        let of_router = self.linear_backward(x, [(l.router, &dlogits)], t, sink);
        self.device.add(&mut dx, &of_router, t * hidden);
        dx
    }

    fn shared_backward(
        &self,
        l: &Shared,
        run: &SharedRun<D>,
        x: &Arc<D::Buffer>,
        dy: &D::Buffer,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> D::Buffer {
        let hidden = self.config().decoder.hidden;
        let dots = self.device.row_dots(dy, &run.y, t, hidden);
        let of_gate: Vec<f32> = dots.iter().zip(&run.shares).map(|(dot, share)| dot * share * (1.0 - share)).collect();
        let of_gate = self.upload(&of_gate);
        if sink.wants(l.gate) {
            let mut g = self.device.zeros(hidden);
            self.device.outer_accumulate(&mut g, &Factors { x, dy: &of_gate, t, m: 1, n: hidden });
            sink.dense(l.gate, &Arc::new(g));
        }
        let mut dout = self.copy_of(dy);
        self.device.scale_rows(&mut dout, &run.shares, hidden);
        let mut dx = self.mlp_backward(&l.mlp, &run.activated, x, &Arc::new(dout), t, sink);
        self.device.add(&mut dx, &self.dx(&[(&of_gate, &self.weights()[l.gate])], t), t * hidden);
        dx
    }

    fn host(&self, buffer: &D::Buffer, len: usize) -> Vec<f32> {
        let mut values = vec![0.0; len];
        self.device.read(buffer, 0, &mut values);
        values
    }

    fn upload(&self, values: &[f32]) -> D::Buffer {
        let mut buffer = self.device.uninit(values.len());
        self.device.write(&mut buffer, 0, values);
        buffer
    }
}

/// Which experts tokens have, and their shares.
pub(crate) struct Routing {
    experts: usize,
    per_token: usize,
    normalised: bool,
    /// (t,E)
    probabilities: Vec<f32>,
    /// (t,k), the likeliest first; of equal ones that with the lower number.
    chosen: Vec<usize>,
    /// (t,k)
    shares: Vec<f32>,
}

impl Routing {
    /// From the router's outputs (t,E).
    fn new(logits: &[f32], experts: usize, per_token: usize, normalised: bool) -> Routing {
        let mut probabilities = logits.to_vec();
        let (mut chosen, mut shares) = (Vec::new(), Vec::new());
        for p in probabilities.chunks_exact_mut(experts) {
            softmax(p);
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
            order.truncate(per_token);
            let sum = if normalised { order.iter().map(|&e| p[e]).sum() } else { 1.0 };
            shares.extend(order.iter().map(|&e| p[e] / sum));
            chosen.extend(order);
        }
        Routing { experts, per_token, normalised, probabilities, chosen, shares }
    }

    /// Each expert that some token has, its tokens, and where their shares are.
    fn runs(&self) -> Vec<(usize, Vec<u32>, Vec<usize>)> {
        let mut runs: Vec<(usize, Vec<u32>, Vec<usize>)> = (0..self.experts).map(|e| (e, vec![], vec![])).collect();
        for (place, &expert) in self.chosen.iter().enumerate() {
            runs[expert].1.push((place / self.per_token) as u32);
            runs[expert].2.push(place);
        }
        runs.retain(|(_, tokens, _)| !tokens.is_empty());
        runs
    }

    fn shares_at(&self, places: &[usize]) -> Vec<f32> {
        places.iter().map(|&place| self.shares[place]).collect()
    }

    /// The gradient of the router's outputs (t,E) from that of the shares (t,k).
    fn backward(&self, dshares: &[f32]) -> Vec<f32> {
        let mut dlogits = vec![0.0; self.probabilities.len()];
        let tokens = self.probabilities.chunks_exact(self.experts).zip(dlogits.chunks_exact_mut(self.experts));
        let places = self.chosen.chunks_exact(self.per_token).zip(self.shares.chunks_exact(self.per_token));
        for (((p, dlogits), (chosen, shares)), dshares) in tokens.zip(places).zip(dshares.chunks_exact(self.per_token))
        {
            // Of the probabilities, of which all but the chosen have none.
            let (mean, sum) = match self.normalised {
                true => (dot(dshares, shares), chosen.iter().map(|&e| p[e]).sum()),
                false => (0.0, 1.0),
            };
            chosen.iter().zip(dshares).for_each(|(&e, dshare)| dlogits[e] = (dshare - mean) / sum);
            let mean = dot(dlogits, p);
            dlogits.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - mean));
        }
        dlogits
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(x: &mut [f32]) {
    let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|v| *v = (*v - top).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|v| *v /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Σ c·share of these logits in f64, with the experts that `routing` chose.
    fn weighted(logits: &[f64], c: &[f32], routing: &Routing) -> f64 {
        let (e, k) = (routing.experts, routing.per_token);
        let token = |(i, logits): (usize, &[f64])| {
            let exp: Vec<f64> = logits.iter().map(|v| v.exp()).collect();
            let chosen = &routing.chosen[i * k..][..k];
            let sum: f64 = if routing.normalised { chosen.iter().map(|&e| exp[e]).sum() } else { exp.iter().sum() };
            chosen.iter().zip(&c[i * k..]).map(|(&e, c)| *c as f64 * exp[e] / sum).sum::<f64>()
        };
        logits.chunks_exact(e).enumerate().map(token).sum()
    }

    #[test]
    fn the_gradient_of_a_routing_is_that_of_finite_differences() {
        let (t, e, k) = (3, 7, 3);
        let logits: Vec<f32> = (0..t * e).map(|i| ((i * i) as f32 * 0.37).sin() * 2.0).collect();
        let c: Vec<f32> = (0..t * k).map(|i| (i as f32 * 1.3).cos()).collect();
        for normalised in [false, true] {
            let routing = Routing::new(&logits, e, k, normalised);
            let gradient = routing.backward(&c);
            for i in 0..t * e {
                let at = |step: f64| {
                    let mut moved: Vec<f64> = logits.iter().map(|v| *v as f64).collect();
                    moved[i] += step;
                    weighted(&moved, &c, &routing)
                };
                let want = (at(1e-4) - at(-1e-4)) / 2e-4;
                assert!((gradient[i] as f64 - want).abs() < 1e-6, "{normalised} at {i}: {} for {want}", gradient[i]);
            }
        }
    }

    #[test]
    fn a_token_has_its_likeliest_experts_and_of_equal_ones_the_first() {
        let routing = Routing::new(&[0.0, 2.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0], 4, 2, true);
        assert_eq!(routing.chosen, [1, 3, 0, 1]);
        assert_eq!(routing.shares, [0.5; 4]);
        let runs = routing.runs();
        assert_eq!(runs, [(0, vec![1], vec![2]), (1, vec![0, 1], vec![0, 3]), (3, vec![0], vec![1])]);
    }

    #[test]
    fn shares_of_what_no_number_is_are_none() {
        let routing = Routing::new(&[f32::NAN, 1.0, 0.0], 3, 2, true);
        assert!(routing.shares.iter().all(|share| share.is_nan()) && routing.chosen.iter().all(|&e| e < 3));
    }
}
