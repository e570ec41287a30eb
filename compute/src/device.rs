//! [`Device`]: what a machine can do, operation by operation.

use crate::layers::{
    Attention, AttentionGrads, AttentionSaved, Columns, Convolution, DeltaGrads, DeltaInputs, DeltaRule, Heads,
    LinearOutput, Norm, Past,
};
use crate::optimizer::{AdamwRows, ApolloCommit, ApolloPrepare, Factors, Limiter, Moments, Write};
use crate::{Dtype, Stream};

/// The operations of one training step. See the crate's text for what they have in common.
///
/// Panics: buffers too small for the shapes given are a mistake of the caller and assert.
pub trait Device: Sized + Send + Sync + 'static {
    /// f32 elements in device memory, owned.
    type Buffer: Send + Sync;
    /// f32 elements, or bf16 ones where [`Device::stores`] says so, that outlive a step, owned: moments, and keys and
    /// values of a context. Operations compute with them in f32, and round moments in bf16 stochastically.
    type Stored: Send + Sync + From<Self::Buffer>;
    /// Unsigned integers in device memory, owned: token ids, targets, lengths.
    type Ids: Send + Sync;
    /// A weight in foreign memory.
    type Weight: Send + Sync;
    /// Recorded work.
    type Graph: Send + Sync;

    /// Runs `f` where the operations of this device run best: the CPU's thread pool, the caller's thread otherwise.
    fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R;
    /// Waits for all that was queued.
    fn synchronize(&self);
    /// Number of rows that a window of `t` rows is padded to, so that recorded work serves it; none where work is
    /// not recorded.
    fn bucket(&self, t: usize) -> Option<usize>;
    /// Records what `work` queues, without running it, to be replayed. Inside, nothing may be read, written from
    /// the host, or made by `ids`; buffers that it leaves keep their place from replay to replay. The recording uses the
    /// memory of `instead`, if given: whoever replays one of the two has done with what the other left.
    fn record(&self, instead: Option<&Self::Graph>, work: &mut dyn FnMut()) -> Self::Graph;
    /// Queues recorded work.
    fn replay(&self, graph: &Self::Graph);

    /// `len` zeros.
    fn zeros(&self, len: usize) -> Self::Buffer;
    /// `len` elements of unspecified content, for whoever sets all that is read.
    fn uninit(&self, len: usize) -> Self::Buffer;
    /// Number of elements of a buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// Token ids on the device.
    fn ids(&self, ids: &[u32]) -> Self::Ids;
    /// Replaces the first `ids.len()` of `dst`.
    fn write_ids(&self, dst: &mut Self::Ids, ids: &[u32]);
    /// Copies host values into `dst` from element `at` on.
    fn write(&self, dst: &mut Self::Buffer, at: usize, src: &[f32]);
    /// Waits for all that was queued and copies `dst.len()` values to the host.
    fn read(&self, src: &Self::Buffer, at: usize, dst: &mut [f32]);
    /// (rows, cols) of a weight.
    fn shape(&self, w: &Self::Weight) -> (usize, usize);
    /// Element type of a weight.
    fn dtype(&self, w: &Self::Weight) -> Dtype;
    /// All values of a weight as f32 on the host, row-major: for checks.
    fn weight_values(&self, w: &Self::Weight) -> Vec<f32>;
    /// Copies bytes `at..at + out.len()` of a weight, counted as the files hold it; a whole number of elements. Waits for
    /// all that was queued.
    fn read_weight(&self, w: &Self::Weight, at: usize, out: &mut [u8]);
    /// Writes bytes of a weight from `at` on, counted as the files hold it; a whole number of elements, each of which
    /// changes as a whole.
    fn write_weight(&self, w: &Self::Weight, at: usize, bytes: &[u8]);
    /// `dst[dst_at..][..len] = src[src_at..][..len]`.
    fn copy(&self, dst: &mut Self::Buffer, dst_at: usize, src: &Self::Buffer, src_at: usize, len: usize);

    /// Whether elements can be stored in this type.
    fn stores(&self, dtype: Dtype) -> bool;
    /// `len` stored zeros of a type that the device stores.
    fn stored(&self, dtype: Dtype, len: usize) -> Self::Stored;
    /// Number of stored elements.
    fn stored_len(&self, stored: &Self::Stored) -> usize;
    /// Their type.
    fn stored_dtype(&self, stored: &Self::Stored) -> Dtype;
    /// `dst[dst_at..][..len]` becomes the first `len` of src, rounded to the nearest.
    fn store(&self, dst: &mut Self::Stored, dst_at: usize, src: &Self::Buffer, len: usize);
    /// `dst[dst_at..][..len] = src[src_at..][..len]`, both of one type.
    fn copy_stored(&self, dst: &mut Self::Stored, dst_at: usize, src: &Self::Stored, src_at: usize, len: usize);
    /// Waits for all that was queued and copies `dst.len()` elements to the host.
    fn read_stored(&self, src: &Self::Stored, at: usize, dst: &mut [f32]);
    /// Copies host values into `dst` from element `at` on, rounded to the nearest.
    fn write_stored(&self, dst: &mut Self::Stored, at: usize, src: &[f32]);

    /// x (t,n): row i is row ids\[i\] of W (vocab,n). Ids beyond W are the caller's mistake.
    fn embed(&self, x: &mut Self::Buffer, w: &Self::Weight, ids: &Self::Ids);
    /// y (t,m) = x (t,n) Wᵀ + bias (m).
    fn linear(&self, y: &mut Self::Buffer, x: &Self::Buffer, w: &Self::Weight, bias: Option<&Self::Weight>, t: usize);
    /// [`Device::linear`] of several weights with one x: each (y, w, bias).
    fn linear_group(&self, outputs: &mut [LinearOutput<Self>], x: &Self::Buffer, t: usize) {
        for LinearOutput { y, w, bias } in outputs {
            self.linear(y, x, w, *bias, t);
        }
    }
    /// [`Device::linear_group`] in which, where it is faster and W is bf16, x is rounded to bf16 first, as it is by servers of
    /// such weights.
    fn linear_group_rounded(&self, outputs: &mut [LinearOutput<Self>], x: &Self::Buffer, t: usize) {
        self.linear_group(outputs, x, t);
    }
    /// dx (t,n) = dy (t,m) W, or dx += if `accumulate`.
    fn linear_dx(&self, dx: &mut Self::Buffer, dy: &Self::Buffer, w: &Self::Weight, t: usize, accumulate: bool);
    /// dx (t,n) = Σ dy W over several pairs (dy, W).
    fn linear_dx_group(&self, dx: &mut Self::Buffer, inputs: &[(&Self::Buffer, &Self::Weight)], t: usize) {
        for (i, (dy, w)) in inputs.iter().enumerate() {
            self.linear_dx(dx, dy, w, t, i > 0);
        }
    }
    /// [`Device::linear_dx_group`] in which, where it is faster and W is bf16, dy is rounded to bf16 first, as trainers of such
    /// weights do.
    fn linear_dx_group_rounded(&self, dx: &mut Self::Buffer, inputs: &[(&Self::Buffer, &Self::Weight)], t: usize) {
        self.linear_dx_group(dx, inputs, t);
    }
    /// db (m) = sum over the t rows of dy (t,m).
    fn sum_rows(&self, db: &mut Self::Buffer, dy: &Self::Buffer, t: usize, m: usize);
    /// g (rows·cols) of G = dyᵀ x, added: the stored gradient, for collectors and checks only.
    fn outer_accumulate(&self, g: &mut Self::Buffer, f: &Factors<Self::Buffer>);
    /// `x[i] += y[i]` for i < len.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, len: usize);

    /// The first `columns` of `rows` rows are copied from where `from` says to where `to` says.
    fn copy_columns(
        &self,
        dst: &mut Self::Buffer,
        to: Columns,
        src: &Self::Buffer,
        from: Columns,
        columns: usize,
        rows: usize,
    );

    /// y = x / rms(x) · (w + offset) over rows of w's length; rms = sqrt(mean(x²) + eps).
    fn rms_norm(&self, y: &mut Self::Buffer, x: &Self::Buffer, w: &Self::Weight, norm: Norm, rows: usize);
    /// dx += gradient of the norm's input; dw (n) = gradient of w summed over the rows.
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_backward(
        &self,
        dx: &mut Self::Buffer,
        dw: &mut Self::Buffer,
        dy: &Self::Buffer,
        x: &Self::Buffer,
        w: &Self::Weight,
        norm: Norm,
        rows: usize,
    );
    /// Rotates x (t, heads, dim) in place: pairs (i, i + rotated/2), i < rotated/2, of each head by the angle of position
    /// p = `position` (one element) + row; what lies beyond `rotated` stays. `table` is (positions, rotated): cos then sin
    /// halves, already scaled. `inverse` multiplies by the transposed rotation (backward).
    fn rope(
        &self,
        x: &mut Self::Buffer,
        table: &Self::Buffer,
        position: &Self::Ids,
        t: usize,
        heads: Heads,
        inverse: bool,
    );
    /// out (t, heads·head_dim) and lse (heads, t): causal attention of queries at positions
    /// past.len.. over the frozen past and over k, v (t, kv_heads·head_dim) of the same rows.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        out: &mut Self::Buffer,
        lse: &mut Self::Buffer,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        past: Past<Self>,
        t: usize,
        shape: &Attention,
    );
    /// Gradients of q, k and v of the window (set, not added); the past gets none.
    fn attention_backward(
        &self,
        grads: AttentionGrads<Self::Buffer>,
        saved: AttentionSaved<Self>,
        t: usize,
        shape: &Attention,
    );
    /// h = silu(gate) · up, element by element.
    fn swiglu(&self, h: &mut Self::Buffer, gate: &Self::Buffer, up: &Self::Buffer, len: usize);
    /// Gradients of gate and up from dh; dh may not alias them.
    fn swiglu_backward(
        &self,
        dgate: &mut Self::Buffer,
        dup: &mut Self::Buffer,
        dh: &Self::Buffer,
        gate: &Self::Buffer,
        up: &Self::Buffer,
        len: usize,
    );
    /// h = x·σ(gate), element by element.
    fn sigmoid_gate(&self, h: &mut Self::Buffer, x: &Self::Buffer, gate: &Self::Buffer, len: usize);
    /// Gradients of x and gate from dh; dh may not alias them.
    fn sigmoid_gate_backward(
        &self,
        dx: &mut Self::Buffer,
        dgate: &mut Self::Buffer,
        dh: &Self::Buffer,
        x: &Self::Buffer,
        gate: &Self::Buffer,
        len: usize,
    );
    /// y (t,C) = silu(p) of p\[i,c\] = Σ_j w\[c,j\]·x\[i-K+1+j,c\], where `before` (K-1,C) are the x of the tokens before the first:
    /// a causal convolution of each channel by itself. w is one row, the K elements of each channel in turn.
    fn causal_conv(
        &self,
        y: &mut Self::Buffer,
        x: &Self::Buffer,
        before: &Self::Buffer,
        w: &Self::Weight,
        t: usize,
        shape: Convolution,
    );
    /// Gradients of x (t,C) and of w (C·K), set; the tokens before get none.
    #[allow(clippy::too_many_arguments)]
    fn causal_conv_backward(
        &self,
        dx: &mut Self::Buffer,
        dw: &mut Self::Buffer,
        dy: &Self::Buffer,
        x: &Self::Buffer,
        before: &Self::Buffer,
        w: &Self::Weight,
        t: usize,
        shape: Convolution,
    );
    /// out (t, value_heads·value_dim): the gated delta rule over t tokens from `inputs.state` on, and the state after them
    /// into `next`. A key head serves value_heads/key_heads value heads, one after the other (arXiv:2412.06464).
    fn delta_rule(
        &self,
        out: &mut Self::Buffer,
        next: Option<&mut Self::Buffer>,
        inputs: DeltaInputs<Self>,
        t: usize,
        shape: &DeltaRule,
    );
    /// Gradients of everything but the state before, set.
    fn delta_rule_backward(
        &self,
        grads: DeltaGrads<Self::Buffer>,
        dout: &Self::Buffer,
        inputs: DeltaInputs<Self>,
        t: usize,
        shape: &DeltaRule,
    );
    /// losses\[i\] = -log softmax(logits row i)\[targets\[i\]\]; logits (t,v) become scale·(softmax - onehot), with one
    /// element in `scale`. A row whose target is [`NO_TARGET`](crate::NO_TARGET) has loss 0 and becomes zeros.
    fn cross_entropy(
        &self,
        losses: &mut Self::Buffer,
        logits: &mut Self::Buffer,
        targets: &Self::Ids,
        v: usize,
        scale: &Self::Buffer,
    );

    /// counter\[at\] += number of elements that are not finite among the first `len` of each (buffer, len).
    fn count_nonfinite(&self, counter: &mut Self::Buffer, at: usize, items: &[(&Self::Buffer, usize)]);
    /// out\[i\] = sum of the squares of the first `len` elements of item i, in f64 and rounded at the end.
    fn sum_squares(&self, out: &mut Self::Buffer, items: &[(&Self::Buffer, usize)]);
    /// p (r,d) ~ N(0, 1/r) from the stream; the same numbers on every device
    /// up to the last bit of its sine and logarithm.
    fn normal_projection(&self, p: &mut Self::Buffer, rank: usize, dim: usize, stream: Stream);
    /// First pass of a step, writes neither state nor W: the scaling s (max(m,n), or 1 for tensor
    /// scaling) of each tensor from the moments as they would become, and ‖U‖ into slot `NORM_UPDATE` at `at`. If
    /// anything overflows, a square of the compressed gradient included, that slot is not finite and
    /// s is unspecified: such a step must not be committed.
    fn apollo_prepare(&self, norms: &mut Self::Buffer, tensors: &mut [ApolloPrepare<Self>]);
    /// Slots `NORM_FACTOR` and `NORM_NEXT` from `NORM_PREVIOUS` and `NORM_UPDATE`, for each (at, limiter).
    fn limit(&self, norms: &mut Self::Buffer, limiters: &[(usize, Limiter)]);
    /// Second pass: moments and W of each tensor are written, each once; `NORM_PREVIOUS` becomes `NORM_NEXT`.
    /// Cannot fail. The step is `write.step` times slot `NORM_FACTOR`.
    fn apollo_commit(&self, norms: &mut Self::Buffer, tensors: &mut [ApolloCommit<Self>]);
    /// AdamW with the gradient in factors, formed block by block: `exp_avg`, `exp_avg_sq` (m,n).
    /// `write.step` is lr·sqrt(1-b2^t)/(1-b1^t).
    fn adamw_factors(
        &self,
        w: &Self::Weight,
        exp_avg: &mut Self::Stored,
        exp_avg_sq: &mut Self::Stored,
        f: &Factors<Self::Buffer>,
        moments: Moments,
        write: Write,
    );
    /// dst row i becomes src row index\[i\], rows of n.
    fn gather_rows(&self, dst: &mut Self::Buffer, src: &Self::Buffer, index: &[u32], n: usize) {
        index.iter().enumerate().for_each(|(i, &row)| self.copy(dst, i * n, src, row as usize * n, n));
    }
    /// Each row of n elements, as many as there are scales, is multiplied by its own.
    fn scale_rows(&self, x: &mut Self::Buffer, scales: &[f32], n: usize) {
        let mut rows = vec![0.0; scales.len() * n];
        self.read(x, 0, &mut rows);
        let scaled = rows.chunks_exact_mut(n.max(1)).zip(scales);
        scaled.for_each(|(row, scale)| row.iter_mut().for_each(|v| *v *= scale));
        self.write(x, 0, &rows);
    }
    /// The product of row i of a with row i of b, of n elements each.
    fn row_dots(&self, a: &Self::Buffer, b: &Self::Buffer, rows: usize, n: usize) -> Vec<f32> {
        let [a, b] = [a, b].map(|x| {
            let mut values = vec![0.0; rows * n];
            self.read(x, 0, &mut values);
            values
        });
        let rows = a.chunks_exact(n.max(1)).zip(b.chunks_exact(n.max(1)));
        rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>() as f32).collect()
    }
    /// dst row index\[i\] += src row i, rows of n.
    fn scatter_add_rows(&self, dst: &mut Self::Buffer, src: &Self::Buffer, index: &Self::Ids, n: usize);
    /// Rows at.. of y (·,m) become zeros with a 1 in column ids\[i\].
    fn one_hot(&self, y: &mut Self::Buffer, at: usize, ids: &Self::Ids, m: usize);
    /// AdamW on rows of some tensors: row i of g belongs to row rows\[i\].row of W, its moments to row rows\[i\].slot.
    fn adamw_rows(&self, tensors: &mut [AdamwRows<Self>], moments: Moments);
}
