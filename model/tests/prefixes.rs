//! Contexts that begin alike: what is run once, for how long it serves, and how much of it is kept.

mod common;

use anyhow::Result;
use common::{Machine, cases, gradients, load, relative};
use compute::{Collector, Cpu, Dtype};
use model::{Cache, Example, Extent, Model, PrefixLimits, Timings};
use std::sync::Arc;

on_every_device!(
    a_prefix_is_run_once_while_the_weights_stay,
    a_state_serves_only_what_goes_on_where_it_ends,
    a_prefix_serves_as_many_updates_as_it_may,
    what_is_kept_has_a_bound_and_the_unused_goes,
    the_same_examples_and_updates_give_the_same_bytes,
);

/// `shared` tokens of one beginning, then `own` of a kind.
fn context(beginning: u32, shared: usize, kind: u32, own: usize) -> Vec<u32> {
    let token = |i: usize, salt: u32| (i as u32 * 31 + salt * 17 + 7) % 90;
    (0..shared).map(|i| token(i, beginning)).chain((0..own).map(|i| token(i, 100 + kind))).collect()
}

/// Trains on the last five of these tokens; the gradients of all tensors, and how many tokens of context were run.
fn train<D: Machine>(device: &Arc<D>, model: &Model<D>, cache: &mut Cache<D>, ids: &[u32]) -> Result<(Vec<f32>, u64)> {
    let example = Example::new(ids.to_vec(), vec![ids.len() - 5..ids.len()])?;
    let mut collector = Collector::new(device.clone(), &model.shapes());
    let before = cache.tokens_run();
    device.run(|| model.train(cache, &example, Extent::Frozen, 0.2, &mut collector, &mut Timings::default()));
    let mut all = Vec::new();
    for gradient in &collector.gradients {
        let mut values = vec![0.0; device.len(gradient)];
        device.read(gradient, 0, &mut values);
        all.extend(values);
    }
    Ok((all, cache.tokens_run() - before))
}

fn keeping<D: Machine>(model: &Model<D>, tokens: usize, max_updates: u64) -> Cache<D> {
    let mut cache = model.cache(128);
    cache.keep_prefixes(PrefixLimits { tokens, max_updates });
    cache
}

/// The examples of one step take turns between two beginnings, which without the cache costs every context in full.
fn a_prefix_is_run_once_while_the_weights_stay<D: Machine>() -> Result<()> {
    let device = D::open();
    for dir in cases() {
        let model = load(&device, &dir, Dtype::F32)?;
        if model.config().decoder.delta_net.is_some() {
            continue;
        }
        let mut cache = keeping(&model, 1024, 0);
        // 70 tokens are two whole blocks and six more; a context ends one token before the decision.
        for (i, (beginning, run)) in [(1, 84), (2, 84), (1, 20), (2, 20), (1, 20)].into_iter().enumerate() {
            let ids = context(beginning, 70, i as u32, 20);
            let (got, tokens) = train(&device, &model, &mut cache, &ids)?;
            assert_eq!(tokens, run, "{} example {i}", dir.display());
            let alone = Example::new(ids.clone(), vec![ids.len() - 5..ids.len()])?;
            let want = gradients(&device, &model, &alone, Extent::Frozen).1.concat();
            let error = relative(&got, &want);
            // The same keys in other cuts.
            assert!(error < 1e-5, "{} example {i}: {error:.1e}", dir.display());
        }
    }
    Ok(())
}

/// Of a model with recurrent layers nothing is kept but the context that was run last, and that cannot be cut.
fn a_state_serves_only_what_goes_on_where_it_ends<D: Machine>() -> Result<()> {
    let device = D::open();
    let hybrid =
        |dir: &std::path::PathBuf| dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with("qwen35"));
    let dirs: Vec<_> = cases().into_iter().filter(hybrid).collect();
    assert_eq!(dirs.len(), 3);
    for dir in dirs {
        let model = load(&device, &dir, Dtype::F32)?;
        let mut cache = keeping(&model, 1024, 0);
        let long = context(1, 60, 0, 0);
        // Longer than the one before, shorter, another one, the same, and after an update.
        for (i, (ids, run)) in [
            (&long[..30], 24),
            (&long[..], 30),
            (&long[..40], 34),
            (&context(2, 40, 0, 0), 34),
            (&context(2, 40, 0, 0), 0),
            (&context(2, 40, 0, 0), 34),
        ]
        .into_iter()
        .enumerate()
        {
            if i == 5 {
                cache.weights_moved();
            }
            let (got, tokens) = train(&device, &model, &mut cache, ids)?;
            assert_eq!((tokens, cache.tokens_kept()), (run, 0), "{} example {i}", dir.display());
            let alone = Example::new(ids.to_vec(), vec![ids.len() - 5..ids.len()])?;
            let error = relative(&got, &gradients(&device, &model, &alone, Extent::Frozen).1.concat());
            assert!(error < 1e-4, "{} example {i}: {error:.1e}", dir.display());
        }
    }
    Ok(())
}

fn a_prefix_serves_as_many_updates_as_it_may<D: Machine>() -> Result<()> {
    let device = D::open();
    let model = load(&device, &cases()[0], Dtype::F32)?;
    for max_updates in [0, 1, 3] {
        let mut cache = keeping(&model, 1024, max_updates);
        let mut ran = Vec::new();
        for step in 0..8 {
            ran.push(train(&device, &model, &mut cache, &context(1, 70, step, 20))?.1);
            cache.weights_moved();
        }
        // In full, then as often as it may serve, then in full again.
        let want: Vec<u64> = (0..8).map(|step| if step % (max_updates + 1) == 0 { 84 } else { 20 }).collect();
        assert_eq!(ran, want, "{max_updates}");
    }
    // What rests on an old beginning is no younger than it.
    let mut cache = keeping(&model, 1024, 1);
    let short = context(1, 70, 0, 0);
    train(&device, &model, &mut cache, &short)?;
    cache.weights_moved();
    assert_eq!(train(&device, &model, &mut cache, &context(1, 110, 0, 0))?.1, 104 - 64);
    assert_eq!(cache.tokens_kept(), 96);
    cache.weights_moved();
    assert_eq!(cache.tokens_kept(), 0);
    assert_eq!(train(&device, &model, &mut cache, &context(1, 110, 0, 0))?.1, 104);
    Ok(())
}

fn what_is_kept_has_a_bound_and_the_unused_goes<D: Machine>() -> Result<()> {
    let device = D::open();
    let model = load(&device, &cases()[0], Dtype::F32)?;
    let mut cache = keeping(&model, 5 * 32 + 31, 0);
    let mut run = |beginning: u32| -> Result<u64> {
        let ran = train(&device, &model, &mut cache, &context(beginning, 70, 0, 0))?.1;
        assert!(cache.tokens_kept() <= 5 * 32, "{} tokens", cache.tokens_kept());
        Ok(ran)
    };
    // Two blocks each: the third beginning takes the place of the second, because the first was used since.
    let ran = [1, 2, 1, 3, 1, 3, 2].map(&mut run).into_iter().collect::<Result<Vec<_>>>()?;
    assert_eq!(ran[..6], [64, 64, 0, 64, 0, 0], "{ran:?}");
    // Its leaf went, its root may have stayed.
    assert!(ran[6] == 64 || ran[6] == 32, "{ran:?}");
    // A context that is longer than all that may be kept keeps its beginning.
    let mut cache = keeping(&model, 64, 0);
    train(&device, &model, &mut cache, &context(1, 110, 0, 0))?;
    assert_eq!(cache.tokens_kept(), 64);
    cache.clear();
    assert_eq!(train(&device, &model, &mut cache, &context(1, 110, 0, 0))?.1, 104 - 64);
    cache.forget();
    assert_eq!((cache.len(), cache.tokens_kept()), (0, 0));
    // None without being asked to.
    let mut cache = model.cache(128);
    train(&device, &model, &mut cache, &context(1, 110, 0, 0))?;
    assert_eq!(cache.tokens_kept(), 0);
    Ok(())
}

fn the_same_examples_and_updates_give_the_same_bytes<D: Machine>() -> Result<()> {
    let device = D::open();
    let model = load(&device, &cases()[0], Dtype::F32)?;
    let all = || -> Result<Vec<Vec<u32>>> {
        // Small, so that blocks come and go.
        let mut cache = keeping(&model, 160, 2);
        (0..24u32)
            .map(|step| {
                let (beginning, shared) = (step * step % 4, 40 + (step * 13 % 50) as usize);
                let gradients = train(&device, &model, &mut cache, &context(beginning, shared, step, 9))?.0;
                if step % 3 > 0 {
                    cache.weights_moved();
                }
                Ok(gradients.iter().map(|g| g.to_bits()).collect())
            })
            .collect()
    };
    assert!(all()? == all()?);
    Ok(())
}

/// Also where keys and values are bf16.
#[test]
fn a_prefix_in_bf16_is_the_one_that_was_run() -> Result<()> {
    let device = <Cpu as Machine>::open();
    let model = load(&device, &cases()[0], Dtype::BF16)?;
    let mut cache = keeping(&model, 1024, 0);
    let ids = context(1, 70, 0, 20);
    train(&device, &model, &mut cache, &context(1, 64, 1, 20))?;
    cache.clear();
    let (got, ran) = train(&device, &model, &mut cache, &ids)?;
    let alone = Example::new(ids.clone(), vec![ids.len() - 5..ids.len()])?;
    let error = relative(&got, &gradients(&device, &model, &alone, Extent::Frozen).1.concat());
    // What was run after the shared part saw it rounded.
    assert!(ran == 20 && error < 1e-2, "{ran} tokens, {error:.1e}");
    Ok(())
}
